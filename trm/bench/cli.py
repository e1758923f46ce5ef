"""The command `trm-bench`: runs a benchmark, prints its table, and ends with one line of JSON."""

import json
import logging
import os
import platform
import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg

from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.bench import decode, serve
from trm.chat import ChatFormat
from trm.device import lay_out_for_decoding
from trm.errors import ConfigError
from trm.settings import Settings, run_command

logger = logging.getLogger(__name__)


class BenchSettings(Settings):
    """Measure decoding (the engine against generate(), lockstep depth, full depth, and itself without drafts), or
    serving: a trm-serve process against the bare engine.
    """

    command: ClassVar[str] = "trm-bench"

    benchmark: CliPositionalArg[Literal["decode", "serve"]] = Field(description="what to measure")
    model: str | None = Field(None, description="checkpoint directory or hub id; default the bundled model")
    num_requests: int = Field(64, ge=2, description="requests to decode")
    max_rows: int = Field(32, ge=1, description="rows decoded together; serve: concurrent streams")
    repeats: int = Field(
        3,
        ge=1,
        description="timed runs of each way, in turn, after a warm-up; their median counts",
    )
    num_threads: int = Field(2, ge=1, description="CPU threads that decode")
    full: bool = Field(False, description="decode: also measure the cost of a token against the length of its context")
    seed: int = Field(0, ge=0, description="of the requests")

    @property
    def source(self) -> str:
        """The model that is measured."""
        return self.model or str(bundled_model_path())


def run_decode(settings: BenchSettings, model: TRMForCausalLM, chat: ChatFormat) -> dict[str, Any]:
    """Part by part."""
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
    return {**decode.ratios(raw), "raw": raw}


def run_serve(settings: BenchSettings, model: TRMForCausalLM, chat: ChatFormat) -> dict[str, Any]:
    """The server as a process."""
    raw = serve.compare(
        settings.source,
        model,
        chat,
        settings.num_requests,
        settings.max_rows,
        settings.num_threads,
        settings.repeats,
        settings.seed,
    )
    return {**serve.ratios(raw), "raw": raw}


BENCHMARKS = {"decode": (run_decode, decode.table), "serve": (run_serve, serve.table)}


def _bench() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", level="INFO")
    settings = BenchSettings.from_command_line()
    torch.set_num_threads(settings.num_threads)
    model = TRMForCausalLM.from_pretrained(settings.source, dtype=torch.float32)
    lay_out_for_decoding(model)
    chat = ChatFormat(checkpoint.read_tokenizer(settings.source), model.config.normalize_text)
    run, table = BENCHMARKS[settings.benchmark]
    result = {
        "benchmark": settings.benchmark,
        **run(settings, model, chat),
        "requests": settings.num_requests,
        "max_rows": settings.max_rows,
        "threads": settings.num_threads,
        "seed": settings.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    print(table(result))  # noqa: T201 - the table
    print(json.dumps(result))  # noqa: T201 - the command's result


def main() -> None:
    """Entry point of `trm-bench`."""
    run_command(_bench, BenchSettings.command)
