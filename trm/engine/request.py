"""What callers and the engine say to each other: requests in, events out. Touches no tensors."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

from trm.errors import BadRequest, TRMError

FinishReason = Literal["stop", "length", "cancelled", "error"]
Candidates = tuple[tuple[int, float], ...]  # token ids and their log probabilities, best first
TokenTrace = tuple[Candidates, ...]  # of one token: after step 0, which is the backbone's answer, and each step taken

MAX_TOP_LOGPROBS = 20
MAX_TRACE = 10


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, which belong to it unless they are open ends."""

    least: float
    most: float = math.inf
    open_least: bool = False
    open_most: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.least if self.open_least else value >= self.least
        return above and (value < self.most if self.open_most else value <= self.most)

    def __str__(self) -> str:
        lower = f"above {self.least}" if self.open_least else f"at least {self.least}"
        return lower if self.most == math.inf else f"{lower} and {'below' if self.open_most else 'at most'} {self.most}"


RANGES: Mapping[str, Range] = {
    "max_tokens": Range(1),
    "temperature": Range(0, 2),
    "top_p": Range(0, 1),
    "top_k": Range(-1),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0.01, 10),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "seed": Range(-(2**63), 2**63 - 1),
    "halt_threshold": Range(0, 1, open_least=True, open_most=True),
    "halt_tolerance": Range(0, 1, open_least=True),
    "logprobs": Range(0, MAX_TOP_LOGPROBS),
    "trace": Range(1, MAX_TRACE),
}
"""What the numbers of SamplingParams may be."""

BIASES = Range(-100, 100)
"""What the numbers in logit_bias may be."""


@dataclass(frozen=True)
class SamplingParams:
    """How one reply is decoded. Raises BadRequest for a value that cannot be served.

    n_supervision: the effort in supervision steps, None for the model's trained number.
    seed and sample_index key the noise of a sampled token, together with its position.
    repetition_penalty divides (or, below zero, multiplies) the logits of tokens in prompt or reply;
    presence_penalty and frequency_penalty are taken off those in the reply, once and per occurrence;
    logit_bias, pairs of token id and number, is added last. All of them act at temperature 0 too.
    logprobs: how many of the likeliest tokens to report with each token, 0 for the token alone, None
    for nothing; probabilities are the model's own, before penalties and temperature.
    trace: how many of the likeliest tokens to report after every step behind each token, None for nothing;
    a request that is traced is not drafted for.
    halt_threshold, halt_tolerance: end a token's recursion early, when the halting head's probability
    exceeds the one, or the token's probabilities move less than the other in a step (total variation).
    top_k 0 and -1 keep all tokens, top_p 0 the likeliest alone: it makes the temperature 0.
    stop: strings that end the reply and are not part of it. ignore_eos: go on past the end token.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    sample_index: int = 0
    n_supervision: int | None = None
    halt_threshold: float | None = None
    halt_tolerance: float | None = None
    logprobs: int | None = None
    trace: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise BadRequest(f"{name} is {value}; it must be {allowed}", param=name)
        if self.top_p == 0:
            object.__setattr__(self, "temperature", 0.0)
            object.__setattr__(self, "top_p", 1.0)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        for token, bias in self.logit_bias:
            if bias not in BIASES:
                raise BadRequest(f"logit_bias of token {token} is {bias}; it must be {BIASES}", param="logit_bias")
        if not all(self.stop):
            raise BadRequest(f"stop is {reprlib.repr(self.stop)}; it must be strings that are not empty", param="stop")

    @property
    def halts(self) -> bool:
        """Whether a token may take fewer steps than the effort."""
        return self.halt_threshold is not None or self.halt_tolerance is not None

    @property
    def edits_logits(self) -> bool:
        """Whether logits change with what stands in prompt and reply."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True)
class Follow:
    """What may follow some tokens of a reply under its grammar.

    mask: one bit for each token id, the lowest bit of a byte first. complete: nothing may follow but the end.
    failure: why no token may follow, not even the end token.
    """

    mask: bytes
    complete: bool = False
    failure: str | None = None

    def allows(self, token: int) -> bool:
        """Whether `token` may follow."""
        return bool(self.mask[token // 8] >> token % 8 & 1)


class Matcher(Protocol):
    """Walks one reply through its grammar. A pure function of the tokens, whatever was asked before."""

    def follow(self, draft: Sequence[int] = ()) -> Follow:
        """What may follow the reply so far and then `draft`, each token of which must have been free to follow."""

    def advance(self, token: int) -> None:
        """Add a token to the reply: one that may follow, and not the end token."""


class Grammar(Protocol):
    """What replies may look like; see `trm.engine.grammar`."""

    @property
    def field(self) -> str:
        """Of the request, what asks for it, for errors to name."""

    def matcher(self, may_end: bool) -> Matcher:
        """For one reply, empty so far. `may_end`: whether the end token may follow where the grammar is satisfied."""


@dataclass(frozen=True)
class Request:
    """One prompt and how to decode its reply.

    With a grammar only tokens that it allows are chosen, whatever penalties and bias say. The reply ends where
    the grammar lets nothing follow, without an end token, even if that is to be ignored. decoder: which one of the
    engine's decodes it, None for its model's own. stop_before: text from which on stop strings are not looked for.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    grammar: Grammar | None = None
    prompt_field: str = "prompt"  # where its caller got the prompt from, for errors to name
    decoder: str | None = None
    stop_before: str | None = None

    @property
    def positions(self) -> int:
        """Cache positions that the request can need at most."""
        return len(self.prompt_ids) + self.params.max_tokens


@dataclass(frozen=True)
class Usage:
    """What a request took, so far or in all. supervision_steps sums over the reply's tokens.

    cached_tokens: prompt tokens that another request had computed. draft_tokens were proposed by the
    backbone, accepted_tokens of them were what the recursion chose. queue_s: seconds that it waited for a slot.
    """

    prompt_tokens: int
    completion_tokens: int
    supervision_steps: int
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    queue_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probability of one token, and the likeliest ones."""

    logprob: float
    top: Candidates


@dataclass(frozen=True)
class Event:
    """News of one request. Every accepted request ends in exactly one event with a finish_reason.

    token_ids: what was decoded since the last event, the end token included; text: the text that is
    now certain, never half a character nor the beginning of a stop string. logprobs and traces, one for each
    token, where they were asked for. usage: what the request has taken so far. error comes with finish_reason "error".
    stop: with a finish_reason, the stop string that ended the reply, the shortest of those that begin at its end.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: TRMError | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    traces: tuple[TokenTrace, ...] = ()
    stop: str | None = None


@dataclass(frozen=True)
class Reply:
    """A finished request, whole. `token_ids` includes the end token, `text` does not."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] = ()
    traces: tuple[TokenTrace, ...] = ()
    stop: str | None = None  # string that ended it

    @classmethod
    def of(cls, events: Sequence[Event]) -> Self:
        """All that a request's events said, the final one included."""
        last = events[-1]
        assert last.finish_reason is not None, "the last event is final"
        assert last.usage is not None, "a final event has its usage"
        return cls(
            tuple(token for event in events for token in event.token_ids),
            "".join(event.text for event in events),
            last.finish_reason,
            last.usage,
            tuple(one for event in events for one in event.logprobs),
            tuple(one for event in events for one in event.traces),
            last.stop,
        )


@dataclass(frozen=True)
class Stats:
    """Gauges and counters of an engine, as good as at one moment. Counters count from its start.

    steps: turns of the engine's loop; row_places: sum over them of the rows that could have advanced,
    min(max_rows, unfinished requests). row_steps / row_places says how well depth is batched.
    """

    requests_running: int
    requests_waiting: int
    kv_cache_usage_ratio: float
    kv_cache_bytes: int
    kv_cache_bytes_per_token: int
    steps: int
    row_places: int
    ticks: int
    row_steps: int
    backbone_calls: int
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    draft_tokens: int
    accepted_tokens: int
