"""What `trm-bench decode` can be told."""

from typing import ClassVar

from pydantic import Field

from trm.settings import Settings


class DecodeSettings(Settings):
    """Measure decoding: the engine against generate(), lockstep depth, full depth, and itself without drafts."""

    command: ClassVar[str] = "trm-bench decode"

    model: str | None = Field(None, description="checkpoint directory or hub id; default the bundled model")
    num_requests: int = Field(64, ge=2, description="requests to decode")
    max_rows: int = Field(32, ge=1, description="rows decoded together")
    repeats: int = Field(3, ge=1, description="timed runs of each kind, in turn, after a warm-up; the median counts")
    num_threads: int = Field(2, ge=1, description="CPU threads for decoding")
    full: bool = Field(False, description="also measure the cost of a token against the length of its context")
    seed: int = Field(0, ge=0, description="seed of the requests")
