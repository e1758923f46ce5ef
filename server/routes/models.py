"""The models under /v1: the server's own, and the other decoders on its backbone."""

from fastapi import APIRouter

from server.schemas.status import ModelBody, ModelList
from server.serving import Serving, ServingDep

router = APIRouter(prefix="/v1")


@router.get("/models")
async def models(serving: ServingDep) -> ModelList:
    """All that there are, the server's own first."""
    return ModelList(data=[model_body(serving.choose(name)) for name in serving.models])


@router.get("/models/{model:path}")
async def model_by_name(model: str, serving: ServingDep) -> ModelBody:
    """The model of that name; ids may hold slashes."""
    return model_body(serving.choose(model))


def model_body(serving: Serving) -> ModelBody:
    """What there is to say of the model that was chosen."""
    decoder = serving.decoder
    return ModelBody(
        id=serving.model_id,
        created=decoder.loaded_at,
        max_model_len=serving.engine.max_model_len,
        n_supervision=decoder.model.config.n_supervision,
        max_supervision=decoder.max_supervision,
        work=decoder.model.config.work,
    )
