"""What the routes about the server itself say."""

from typing import Literal

from pydantic import BaseModel, Field

from trm.chat import Work


class ModelBody(BaseModel):
    """n_supervision: the supervision steps that the model was trained with; max_supervision: the most that it takes.

    work: how much its replies showed before their answers in training; it takes the others, too, untrained.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwen-trm"
    max_model_len: int
    n_supervision: int
    max_supervision: int
    work: list[Work]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelBody]


class StatusBody(BaseModel):
    status: str


class VersionBody(BaseModel):
    version: str
    model: str
    torch: str
    dtype: str | None = Field(description="what the model decodes in; null while it loads")
    quantize: str | None
    exact: bool | None = Field(
        description="whether a reply is the same to the bit in any company (promise P10); null while the model loads"
    )
