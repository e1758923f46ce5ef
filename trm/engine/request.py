"""What callers and the engine say to each other: requests in, events out. Touches no tensors."""

from dataclasses import dataclass, field
from typing import Literal

from trm.errors import BadRequest, TRMError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How one reply is decoded. Raises BadRequest for a value that cannot be served.

    n_supervision: the effort in supervision steps, None for the model's trained number.
    seed and sample_index key the noise of a sampled token, together with its position.
    stop: strings that end the reply and are not part of it. ignore_eos: go on past the end token.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    n_supervision: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, bool, str], ...] = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 2, "between 0 and 2"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            ("stop", all(self.stop), "strings that are not empty"),
        )
        for name, holds, rule in limits:
            if not holds:
                raise BadRequest(f"{name} is {getattr(self, name)!r}; it must be {rule}", param=name)


@dataclass(frozen=True)
class Request:
    """One prompt and how to decode its reply."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)

    @property
    def positions(self) -> int:
        """Cache positions that the request can need at most."""
        return len(self.prompt_ids) + self.params.max_tokens


@dataclass(frozen=True)
class Usage:
    """What a finished request took. supervision_steps sums over the reply's tokens."""

    prompt_tokens: int
    completion_tokens: int
    supervision_steps: int


@dataclass(frozen=True)
class Event:
    """News of one request. Every accepted request ends in exactly one event with a finish_reason.

    token_ids: what was decoded since the last event, the end token included; text: the text that is
    now certain, never half a character nor the beginning of a stop string. usage comes with the
    finish_reason, error with finish_reason "error".
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: TRMError | None = None


@dataclass(frozen=True)
class Reply:
    """A finished request, whole. `token_ids` includes the end token, `text` does not."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class Stats:
    """Gauges and counters of an engine, read at one moment. Counters count from its start."""

    requests_running: int
    requests_waiting: int
    kv_cache_usage_ratio: float
    kv_cache_bytes: int
    kv_cache_bytes_per_token: int
    ticks: int
    row_steps: int
    backbone_calls: int
    prompt_tokens: int
    generation_tokens: int
