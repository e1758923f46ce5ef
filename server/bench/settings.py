"""What `trm-bench serve` and `trm-bench soak` can be told."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field

from trm import extra
from trm.settings import Settings


class ServeBenchSettings(Settings):
    """Measure what HTTP costs: a trm-serve process against the bare engine, on the same requests."""

    command: ClassVar[str] = "trm-bench serve"

    model: str | None = Field(None, description="checkpoint directory or hub id; default the bundled model")
    num_requests: int = Field(64, ge=2, description="requests to decode")
    max_rows: int = Field(32, ge=1, description="rows decoded together, and streams at a time")
    repeats: int = Field(3, ge=1, description="timed runs of each kind, in turn, after a warm-up; the median counts")
    num_threads: int = Field(2, ge=1, description="CPU threads for decoding, in the server and in the bare engine")
    seed: int = Field(0, ge=0, description="seed of the requests")


class SoakSettings(Settings):
    """Keep a trm-serve process in mixed traffic and see whether it lasts; exit with status 1 if it does not."""

    command: ClassVar[str] = "trm-bench soak"

    model: str | None = Field(None, description="checkpoint directory or hub id; default the bundled model")
    minutes: float = Field(30.0, ge=0.5, description="how long the traffic lasts")
    max_rows: int = Field(32, ge=1, description="rows decoded together, and clients at a time")
    num_threads: int = Field(2, ge=1, description="CPU threads for decoding")
    max_growth: float = Field(
        0.02, gt=0, description="largest growth allowed to memory, descriptors and threads, as a share of their level"
    )
    report: Path | None = Field(None, description="directory for the report and its pictures")
    seed: int = Field(0, ge=0, description="seed of the traffic")

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None) -> Self:
        """As for every command, but who wants pictures learns before the soak whether they can be drawn."""
        settings = super().from_command_line(argv)
        if settings.report is not None:
            extra.require("matplotlib", "--report")
        return settings
