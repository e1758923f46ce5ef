"""The command `trm-bench`: runs a benchmark, prints its table, and ends with one line of JSON."""

import asyncio
import json
import logging
import os
import platform
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg

from server.bench import serve
from server.bench.soak import report as soak_report
from server.bench.soak import run as soak
from server.bench.soak.canaries import Canary, part_at_near_tie
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.bench import decode
from trm.chat import ChatFormat
from trm.device import lay_out_for_decoding
from trm.errors import ConfigError, TRMError
from trm.settings import Settings, run_command

logger = logging.getLogger(__name__)


class BenchSettings(Settings):
    """Measure decoding (the engine against generate(), lockstep depth, full depth, and itself without drafts), or
    serving: a trm-serve process against the bare engine; or soak one in mixed traffic and see whether it holds.
    """

    command: ClassVar[str] = "trm-bench"

    read_by: ClassVar[Mapping[str, Sequence[str]]] = {
        "num_requests": ("decode", "serve"),
        "repeats": ("decode", "serve"),
        "full": ("decode",),
        "minutes": ("soak",),
        "max_growth": ("soak",),
        "report": ("soak",),
    }
    """Settings that not every benchmark reads."""

    benchmark: CliPositionalArg[Literal["decode", "serve", "soak"]] = Field(description="what to measure")
    model: str | None = Field(None, description="checkpoint directory or hub id; default the bundled model")
    num_requests: int = Field(64, ge=2, description="decode, serve: requests to decode")
    max_rows: int = Field(
        32, ge=1, description="rows decoded together; serve: concurrent streams, soak: clients at a time"
    )
    repeats: int = Field(
        3,
        ge=1,
        description="decode, serve: timed runs of each way, in turn, after a warm-up; their median counts",
    )
    num_threads: int = Field(2, ge=1, description="CPU threads that decode")
    full: bool = Field(False, description="decode: also measure the cost of a token against the length of its context")
    minutes: float = Field(30.0, ge=0.5, description="soak: how long the traffic lasts")
    max_growth: float = Field(
        0.02, gt=0, description="soak: by how much of their level memory, descriptors and threads may grow meanwhile"
    )
    report: Path | None = Field(None, description="soak: directory for the report and its pictures")
    seed: int = Field(0, ge=0, description="of the requests")

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None) -> Self:
        """As for every command, but nothing may be asked of a benchmark that does not read it."""
        settings = super().from_command_line(argv)
        for name in settings.model_fields_set & cls.read_by.keys():
            if settings.benchmark not in cls.read_by[name]:
                readers = " and ".join(cls.read_by[name])
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} belongs to {readers}; leave it out for {settings.benchmark}")
        return settings

    @property
    def source(self) -> str:
        """The model that is measured."""
        return self.model or str(bundled_model_path())


def load(settings: BenchSettings) -> tuple[TRMForCausalLM, ChatFormat]:
    """The model in this process, and its words."""
    torch.set_num_threads(settings.num_threads)
    model = TRMForCausalLM.from_pretrained(settings.source, dtype=torch.float32)
    lay_out_for_decoding(model)
    return model, ChatFormat(checkpoint.read_tokenizer(settings.source), model.config.normalize_text)


def run_decode(settings: BenchSettings) -> dict[str, Any]:
    """Part by part."""
    model, chat = load(settings)
    if model.config.kv_source != "context":
        raise ConfigError("the model takes keys and values from the state and cannot halt; decode needs the context's")
    bench = decode.DecodeBench(model, chat, settings.num_requests, settings.max_rows, settings.repeats, settings.seed)
    parts = {
        "throughput": bench.throughput,
        "mixed_effort": bench.mixed_effort,
        "speculation_1_row": lambda: bench.speculation(1),
        "speculation_all_rows": lambda: bench.speculation(settings.max_rows),
        "halting": bench.halting,
        "overhead": bench.overhead,
        "reference_sizes": decode.reference_sizes,
    }
    if settings.full:
        parts["context_curve"] = lambda: {
            kv_source: decode.context_curve(model, kv_source, settings.repeats) for kv_source in ("context", "state")
        }
    raw = {}
    for name, part in parts.items():
        started = time.perf_counter()
        raw[name] = part()
        logger.info("%s: %.0f s", name, time.perf_counter() - started)
    return {**decode.ratios(raw), "requests": settings.num_requests, "raw": raw}


def run_serve(settings: BenchSettings) -> dict[str, Any]:
    """The server as a process."""
    raw = serve.compare(
        settings.source,
        *load(settings),
        settings.num_requests,
        settings.max_rows,
        settings.num_threads,
        settings.repeats,
        settings.seed,
    )
    return {**serve.ratios(raw), "requests": settings.num_requests, "raw": raw}


def run_soak(settings: BenchSettings) -> dict[str, Any]:
    """The server as a process; the model is needed here only for canaries that differ."""

    def same_text(canary: Canary, alone: str, under_load: str) -> bool:
        return part_at_near_tie(*load(settings), canary, alone, under_load)

    plan = soak.Plan(
        settings.model,
        settings.minutes,
        settings.max_rows,
        settings.num_threads,
        settings.seed,
        settings.max_growth,
    )
    return asyncio.run(soak.soak(plan, same_text))


BENCHMARKS = {
    "decode": (run_decode, decode.table),
    "serve": (run_serve, serve.table),
    "soak": (run_soak, soak_report.table),
}


def _bench() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", level="INFO")
    settings = BenchSettings.from_command_line()
    run, table = BENCHMARKS[settings.benchmark]
    result = {
        "benchmark": settings.benchmark,
        **run(settings),
        "max_rows": settings.max_rows,
        "threads": settings.num_threads,
        "seed": settings.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    if settings.report is not None:
        soak_report.write(settings.report, result)
    print(table(result))  # noqa: T201 - the table
    print(json.dumps(result))  # noqa: T201 - the command's result
    if failed := [row["check"] for row in result.get("checks", ()) if not row["holds"]]:
        raise TRMError(f"{len(failed)} checks do not hold: {'; '.join(failed)}")


def main() -> None:
    """Entry point of `trm-bench`. SIGTERM ends it as Ctrl-C does, and with it the server that it has started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(_bench, BenchSettings.command)
