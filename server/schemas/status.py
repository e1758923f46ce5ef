"""What the routes about the server itself say."""

from typing import Literal

from pydantic import BaseModel


class ModelBody(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwen-trm"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelBody]


class StatusBody(BaseModel):
    status: str


class VersionBody(BaseModel):
    version: str
    model: str
    torch: str
