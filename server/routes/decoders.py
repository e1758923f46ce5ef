"""POST /v1/decoders/load and /unload: decoders on the server's backbone that come and go while it runs.

Only where the operator has said so, by keys and a directory to read: see `server.middleware.CLOSED_PATHS`.
"""

import asyncio
import logging

from fastapi import APIRouter, Request

from server.errors import Forbidden
from server.routes.models import model_body
from server.schemas.decoders import DecoderRequest, DecoderUnloaded
from server.schemas.status import ModelBody
from server.serving import Serving, ServingDep
from server.strict_json import StrictRoute
from trm.engine.engine import host
from trm.errors import BadRequest, CheckpointError, ConfigError, UnknownModel
from trm.loading import load_beside

logger = logging.getLogger(__name__)

POLL_S = 0.05  # between two looks whether the last request has ended

router = APIRouter(prefix="/v1/decoders", route_class=StrictRoute)


@router.post("/load")
async def load(body: DecoderRequest, request: Request, serving: ServingDep) -> ModelBody:
    """Load a decoder and serve it under its name, while others decode."""
    _check_allowed(serving)
    if (reason := serving.worker.unavailable()) is not None:
        raise reason
    await asyncio.to_thread(bring, serving, body.name)
    serving.metrics.of(body.name)
    request.app.openapi_schema = None  # it names all models
    return model_body(serving.choose(body.name))


@router.post("/unload")
async def unload(body: DecoderRequest, request: Request, serving: ServingDep) -> DecoderUnloaded:
    """Serve a decoder no longer. New requests for it get 404 at once; answers when the accepted ones have ended."""
    _check_allowed(serving)
    if body.name == serving.model_id:
        raise BadRequest(f"{body.name!r} is the server's own model, which ends with the server", param="name")
    if body.name not in serving.models:
        raise UnknownModel(f"decoder {body.name!r} is not loaded", param="name")
    decoder = serving.engine.unload(body.name)
    logger.info("unloading decoder %s", body.name)
    request.app.openapi_schema = None
    while serving.engine.rows_of(decoder) and serving.engine.alive():
        await asyncio.sleep(POLL_S)
    serving.metrics.forget(body.name)
    return DecoderUnloaded(id=body.name)


def bring(serving: Serving, name: str) -> None:
    """Load a decoder into the engine, which takes a while. Raises BadRequest."""
    engine = serving.engine
    if name in serving.models:
        raise BadRequest(f"{name!r} is served already; unload it first", param="name", code="model_exists")
    source = serving.settings.decoder_source(name)
    if source is None:
        raise UnknownModel(
            f"no decoder {name!r}: --decoder names none, and below --decoder-dir no checkpoint lies there", param="name"
        )
    if not serving.loading.acquire(blocking=False):
        raise BadRequest("another decoder is being loaded; wait until it is", param="name", code="decoder_loading")
    try:
        if left := engine.leaving(name):
            reason = f"{name!r} is being unloaded: {left} of its requests go on; wait until they have ended"
            raise BadRequest(reason, param="name", code="decoder_unloading")
        engine.load(name, host(*load_beside(source, engine.model, engine.chat)))
    except (CheckpointError, ConfigError) as error:
        raise BadRequest(f"decoder {name!r} was not loaded: {error}", param="name", code="decoder_invalid") from error
    finally:
        serving.loading.release()
    logger.info("loaded decoder %s from %s", name, source)


def _check_allowed(serving: Serving) -> None:
    if not serving.may_load:
        raise Forbidden(
            "decoders come and go while the server runs only if it has keys (--api-key) and a --decoder-dir, and is "
            "not one of several replicas; name them with --decoder when it starts",
            code="decoders_fixed",
        )
