"""Requests whose reply must not depend on what else a server is doing, but for near ties."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trm import reference
from trm.chat import ChatFormat, solve_messages
from trm.engine import SamplingParams
from trm.model import TRMForCausalLM

NEAR_TIE = 1e-3  # between the two best scores of a token: there float32 may decide otherwise in a batch than alone


@dataclass(frozen=True)
class Canary:
    """One question to the chat route."""

    question: str
    params: SamplingParams

    @property
    def body(self) -> dict[str, Any]:
        body = {
            "messages": [{"role": "user", "content": self.question}],
            "max_tokens": self.params.max_tokens,
            "supervision_steps": self.params.n_supervision,
            "temperature": self.params.temperature,
            "top_p": self.params.top_p,
            "ignore_eos": self.params.ignore_eos,
        }
        return body | ({"seed": self.params.seed} if self.params.temperature else {})


def make_canaries(questions: Sequence[str], max_steps: int) -> list[Canary]:
    """Greedy and seeded, shallow and deep, short and longer than any answer."""
    ways = (
        SamplingParams(max_tokens=60, n_supervision=min(4, max_steps)),
        SamplingParams(max_tokens=60, n_supervision=max_steps),
        SamplingParams(max_tokens=100, n_supervision=min(1, max_steps), ignore_eos=True),
        SamplingParams(max_tokens=60, n_supervision=min(2, max_steps), temperature=0.8, top_p=0.95, seed=7),
    )
    return [Canary(question, params) for question, params in zip(questions, ways, strict=False)]


def part_at_near_tie(model: TRMForCausalLM, chat: ChatFormat, canary: Canary, one: str, other: str) -> bool:
    """Whether two replies are what the rounding of a batch may make of one: decoded alone, one of them comes out,
    and where they part its two best scores are nearly equal.
    """
    end_id = None if canary.params.ignore_eos else chat.end_id
    reply = reference.decode(model, chat.encode(solve_messages(canary.question)), canary.params, end_id)
    if chat.decode(reply.token_ids) not in (one, other):
        return False
    prefixes = [chat.decode(reply.token_ids[:n]) for n in range(len(reply.token_ids) + 1)]
    first = next(n for n, prefix in enumerate(prefixes) if not (one.startswith(prefix) and other.startswith(prefix)))
    return reply.gaps[first - 1] < NEAR_TIE
