"""Bodies of the routes that load and unload decoders."""

from typing import Literal

from pydantic import BaseModel, Field

from server.schemas.common import Body


class DecoderRequest(Body):
    """name: the decoder's id; of one that is to be loaded also its place below --decoder-dir."""

    name: str = Field(min_length=1, max_length=200)


class DecoderUnloaded(BaseModel):
    """As OpenAI's clients know it of models that were deleted."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
