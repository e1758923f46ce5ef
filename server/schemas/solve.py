"""Bodies of POST /solve."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.schemas.common import Decoding, UsageBody
from server.schemas.rules import Rule
from trm.chat import Work
from trm.engine.request import FinishReason

Outcome = Literal["boxed", "truncated", "missing"]


Question = Annotated[str, Field(pattern=r"\S")]
Questions = Annotated[list[Question], Field(min_length=1)]


def _questions(question: Any) -> Any:
    questions = question if isinstance(question, list) else [question]
    if not all(isinstance(text, str) for text in questions):
        raise PydanticCustomError("question_type", "Input should be a string or a list of strings")
    if not questions or not all(text.strip() for text in questions):
        raise PydanticCustomError("question_empty", "Input should hold at least one question, and no empty one")
    return question


_VARIED = Rule(
    "temperature",
    "temperature is 0, so the samples would all be equal; leave it out, or set n to 1",
    lambda body: body.n in (None, 1) or body.temperature != 0,
    {
        "anyOf": [
            {"properties": {"n": {"enum": [None, 1]}}},
            {"properties": {"temperature": {"not": {"const": 0}}}},
        ]
    },
)


class SolveRequest(Decoding):
    """Body of POST /solve.

    work: what each solution shows before its answer; "full" by default.
    early_stop: cancel the samples of a question that can no longer change its answer. Which ones those are
    depends on what else the server is doing; the answer does not, but its spelling, votes and solution may.
    """

    rules: ClassVar[tuple[Rule, ...]] = (*Decoding.rules, _VARIED)

    model: str | None = None
    question: Annotated[str | list[str], BeforeValidator(_questions, json_schema_input_type=Question | Questions)]
    work: Work | None = None
    stream: bool | None = None
    early_stop: bool | None = None


class Tally(BaseModel):
    """A vote so far, or at its end. samples: how many are counted; agreement: the answer's share of them."""

    answer: str | None
    votes: dict[str, int]
    samples: int
    agreement: float


class SolveResult(Tally):
    """One question's answer. `answer` and `boxed` are null exactly when `outcome` is not "boxed".

    usage counts samples that were cancelled, too.
    """

    outcome: Outcome
    boxed: str | None
    solution: str
    finish_reason: FinishReason
    usage: UsageBody


class SolveResults(BaseModel):
    results: list[SolveResult]


class SolveText(BaseModel):
    """In a stream with n = 1: the next piece of a question's solution."""

    type: Literal["text"] = "text"
    index: int
    text: str


class SolveVote(Tally):
    """In a stream with n > 1: one more sample of a question has ended."""

    type: Literal["vote"] = "vote"
    index: int
    n: int


class SolveEnd(BaseModel):
    """In a stream, once for each question: the result that it would have had without `stream`."""

    type: Literal["result"] = "result"
    index: int
    result: SolveResult
