"""Bodies of POST /solve."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator
from pydantic_core import PydanticCustomError

from server.schemas.common import Decoding, UsageBody
from server.schemas.rules import Rule
from trm.engine.request import FinishReason

Outcome = Literal["boxed", "truncated", "missing"]


def _questions(question: Any) -> Any:
    questions = question if isinstance(question, list) else [question]
    if not all(isinstance(text, str) for text in questions):
        raise PydanticCustomError("question_type", "Input should be a string or a list of strings")
    if not questions or not all(text.strip() for text in questions):
        raise PydanticCustomError("question_empty", "Input should hold at least one question, and none that is empty")
    return question


_VARIED = Rule(
    "temperature",
    "temperature is 0, so the samples would all be equal; leave it out, or take n = 1",
    lambda body: body.n in (None, 1) or body.temperature != 0,
    {
        "anyOf": [
            {"properties": {"n": {"enum": [None, 1]}}},
            {"properties": {"temperature": {"not": {"const": 0}}}},
        ]
    },
)


class SolveRequest(Decoding):
    """Body of POST /solve."""

    rules: ClassVar[tuple[Rule, ...]] = (*Decoding.rules, _VARIED)

    question: Annotated[str | list[str], BeforeValidator(_questions)]


class SolveResult(BaseModel):
    """One question's answer. `answer` and `boxed` are null exactly when `outcome` is not "boxed"."""

    answer: str | None
    outcome: Outcome
    boxed: str | None
    solution: str
    votes: dict[str, int]
    agreement: float
    finish_reason: FinishReason
    usage: UsageBody


class SolveResults(BaseModel):
    results: list[SolveResult]
