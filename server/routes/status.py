"""Routes for operators: is it alive, does it take work, what does it do, what is it."""

from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from server.errors import Unavailable
from server.schemas.status import StatusBody, VersionBody
from server.serving import ServingDep, ServingOrNoneDep

router = APIRouter()


@router.get("/health")
async def health(serving: ServingOrNoneDep) -> StatusBody:
    """200 while the engine lives, also while it starts or stops. Restart a process that says 503."""
    if serving is not None and not serving.engine.alive():
        raise Unavailable("the engine has stopped; restart the server", "device_failed")
    return StatusBody(status="ok")


@router.get("/ready")
async def ready(serving: ServingDep) -> StatusBody:
    """200 while new work is taken."""
    if (reason := serving.worker.unavailable()) is not None:
        raise reason
    return StatusBody(status="ready")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(request.app.state.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def build(request: Request, serving: ServingOrNoneDep) -> VersionBody:
    """Versions of this package and of torch, the model's id, and how it computes."""
    settings = request.app.state.settings
    return VersionBody(
        version=version("qwen-trm"),
        model=settings.model_id,
        torch=version("torch"),
        dtype=None if serving is None else serving.engine.dtype,
        quantize=settings.quantize,
        exact=None if serving is None else serving.engine.exact,
    )
