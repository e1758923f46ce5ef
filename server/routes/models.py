"""The models under /v1: the one that is served."""

from fastapi import APIRouter

from server.schemas.status import ModelBody, ModelList
from server.serving import Serving, ServingDep

router = APIRouter(prefix="/v1")


@router.get("/models")
async def models(serving: ServingDep) -> ModelList:
    """The one model there is."""
    return ModelList(data=[_model(serving)])


@router.get("/models/{model:path}")
async def model_by_name(model: str, serving: ServingDep) -> ModelBody:
    """The model, if that is its name; ids may hold slashes."""
    serving.check_model(model)
    return _model(serving)


def _model(serving: Serving) -> ModelBody:
    engine = serving.engine
    return ModelBody(
        id=serving.model_id,
        created=serving.created,
        max_model_len=engine.max_model_len,
        n_supervision=engine.model.config.n_supervision,
        max_supervision=engine.max_supervision,
        work=engine.model.config.work,
    )
