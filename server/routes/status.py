"""Routes for operators: is it alive, does it take work, what does it do, what is it."""

from importlib.metadata import version

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.errors import Unavailable
from server.schemas.status import StatusBody, VersionBody
from server.serving import ServingDep

router = APIRouter()


@router.get("/health")
async def health(serving: ServingDep) -> StatusBody:
    """200 while the engine lives, a stopping one included; a process that says 503 must be restarted."""
    if not serving.engine.alive():
        raise Unavailable("the engine has stopped; restart the server", "device_failed")
    return StatusBody(status="ok")


@router.get("/ready")
async def ready(serving: ServingDep) -> StatusBody:
    """200 while new work is taken."""
    serving.worker.check_available()
    return StatusBody(status="ready")


@router.get("/metrics")
async def metrics(serving: ServingDep) -> Response:
    """Prometheus' text format."""
    return Response(serving.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def build(serving: ServingDep) -> VersionBody:
    """Versions of this package and of torch, and the model's id."""
    return VersionBody(version=version("qwen-trm"), model=serving.model_id, torch=version("torch"))
