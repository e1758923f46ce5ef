"""The command `trm-bench`: runs a benchmark, prints its table, and ends with one line of JSON."""

import json
import logging
import os
import platform
import statistics
import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg

from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.bench.decode import DecodeBench, context_curve, ratios, reference_sizes
from trm.chat import ChatFormat
from trm.device import lay_out_for_decoding
from trm.errors import ConfigError
from trm.settings import Settings, run_command

logger = logging.getLogger(__name__)


class BenchSettings(Settings):
    """Measure decoding: the engine against generate(), lockstep depth, full depth, and itself without drafts."""

    command: ClassVar[str] = "trm-bench"

    benchmark: CliPositionalArg[Literal["decode"]] = Field(description="what to measure")
    model: str | None = Field(None, description="checkpoint directory or hub id; default the bundled model")
    num_requests: int = Field(64, ge=2, description="requests to decode")
    max_rows: int = Field(32, ge=1, description="rows decoded together")
    repeats: int = Field(
        3,
        ge=1,
        description="timed runs of each way, in turn, after a warm-up; their median counts",
    )
    num_threads: int = Field(2, ge=1, description="CPU threads")
    full: bool = Field(False, description="also measure the cost of a token against the length of its context")
    seed: int = Field(0, ge=0, description="of the requests")


def decode(settings: BenchSettings) -> dict[str, Any]:
    """Run the decoding benchmark; returns what the JSON line holds."""
    torch.set_num_threads(settings.num_threads)
    source = settings.model or str(bundled_model_path())
    model = TRMForCausalLM.from_pretrained(source, dtype=torch.float32)
    lay_out_for_decoding(model)
    if model.config.kv_source != "context":
        raise ConfigError(f"{source} takes keys and values from the state and cannot halt; the benchmark needs context")
    chat = ChatFormat(checkpoint.read_tokenizer(source), model.config.normalize_text)
    bench = DecodeBench(model, chat, settings.num_requests, settings.max_rows, settings.repeats, settings.seed)
    parts = {
        "throughput": bench.throughput,
        "mixed_effort": bench.mixed_effort,
        "speculation_1_row": lambda: bench.speculation(1),
        "speculation_all_rows": lambda: bench.speculation(settings.max_rows),
        "halting": bench.halting,
        "overhead": bench.overhead,
        "reference_sizes": reference_sizes,
    }
    if settings.full:
        parts["context_curve"] = lambda: {
            kv_source: context_curve(model, kv_source, settings.repeats) for kv_source in ("context", "state")
        }
    raw = {}
    for name, part in parts.items():
        started = time.perf_counter()
        raw[name] = part()
        logger.info("%s: %.0f s", name, time.perf_counter() - started)
    return {
        "benchmark": "decode",
        **ratios(raw),
        "raw": raw,
        "requests": len(bench.requests),
        "max_rows": settings.max_rows,
        "threads": settings.num_threads,
        "seed": settings.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


def table(result: dict[str, Any]) -> str:
    """The result for people: a Markdown table, then the curves if there are any."""
    raw, median = result["raw"], statistics.median
    throughput, mixed, halting = raw["throughput"], raw["mixed_effort"], raw["halting"]
    single, many, sizes = raw["speculation_1_row"], raw["speculation_all_rows"], raw["reference_sizes"]
    tokens, count, rows = throughput["tokens"], result["requests"], result["max_rows"]

    def rate(seconds: list[float], number: int = tokens) -> str:
        return f"{number / median(seconds):.0f} tokens/s"

    def mixed_rate(way: str) -> str:
        return rate(mixed[f"{way}_s"], mixed[way]["generation_tokens"])

    batching = (many["without"]["generation_tokens"] / median(many["without_s"])) / (
        single["without"]["generation_tokens"] / median(single["without_s"])
    )

    def accepted(run: dict[str, Any]) -> str:
        drafted = max(run["draft_tokens"], 1)
        return f"{run['accepted_tokens'] / drafted:.0%} of {run['draft_tokens']} drafted tokens accepted"

    def per_pass(run: dict[str, Any]) -> str:
        return f"{run['generation_tokens'] / (run['row_steps'] / throughput['effort']):.2f} tokens a pass"

    lines = [
        f"{count} requests, {tokens} tokens, {rows} rows, {result['threads']} threads, torch {result['torch']}",
        "",
        "| | ratio | measured |",
        "|---|---|---|",
        f"| engine / generate(), one request at a time (once) | {result['continuous_vs_sequential']:.2f} | "
        f"{rate(throughput['engine_s'])} against {rate(throughput['sequential_s'])}, effort {throughput['effort']}; "
        f"{throughput['requests_equal_to_sequential']} of {count} replies equal |",
        f"| engine / generate() in static batches of {rows} | {result['continuous_vs_static']:.2f} | against "
        f"{rate(throughput['static_s'])} |",
        f"| mixed effort {mixed['efforts']} / all rows as deep as the deepest | "
        f"{result['mixed_effort_vs_lockstep']:.2f} | {mixed_rate('continuous')} against {mixed_rate('lockstep')}, "
        f"{mixed['requests']} requests |",
        f"| mixed effort / one effort after another | {result['mixed_effort_vs_grouped']:.2f} | against "
        f"{rate(mixed['grouped_s'], mixed['continuous']['generation_tokens'])} |",
        f"| mixed effort / shallow rows wait for the deepest | {result['mixed_effort_vs_waiting']:.2f} | against "
        f"{mixed_rate('waiting')}; {mixed['requests_equal']} of {mixed['requests']} replies equal |",
        f"| row-steps of the ideal | {result['ideal_row_steps']:.3f} | {mixed['continuous']['row_steps']} of "
        f"{mixed['continuous']['row_places']}; with waiting "
        f"{mixed['waiting']['row_steps'] / mixed['waiting']['row_places']:.3f} |",
        f"| batching alone: engine without drafts, {rows} rows / 1 row | {batching:.2f} | |",
        f"| drafting, 1 row | {result['speculation_1_row']:.2f} | {accepted(single['with'])}, "
        f"{per_pass(single['with'])}; {single['requests_equal']} of {single['requests']} replies equal |",
        f"| drafting, {rows} rows | {result['speculation_32_rows']:.2f} | {accepted(many['with'])}, "
        f"{per_pass(many['with'])}; {many['requests_equal']} of {many['requests']} replies equal |",
        f"| halting at effort {halting['effort']} | {result['halting_speedup']:.2f} | tolerance "
        f"{halting['chosen']['tolerance']}: {halting['halted_steps'] / halting['tokens']:.2f} steps a token; "
        f"{result['halting_agreement']:.2%} of {halting['chosen']['positions']} positions agree "
        f"(chosen on these replies), {halting['requests_equal']} of {count} replies equal |",
        f"| time outside model calls | {result['overhead_share_32_rows']:.3f} | "
        f"{sum(raw['overhead']['total_s']) - sum(raw['overhead']['model_s']):.2f} of "
        f"{sum(raw['overhead']['total_s']):.2f} s at {raw['overhead']['rows']} rows |",
        f"| D = 256, 4 layers, 336 calls a token, 1 row, 1 thread | | "
        f"{sizes['tokens'] / sizes['context_s']:.1f} tokens/s, "
        f"with keys from the state {sizes['tokens'] / sizes['state_s']:.1f} |",
    ]
    for kv_source, curve in raw.get("context_curve", {}).items():
        lengths = list(curve["seconds"])
        lines += [
            "",
            f"| keys from the {kv_source}, {curve['rows']} rows, context | " + " | ".join(map(str, lengths)) + " |",
            "|---|" + "---|" * len(lengths),
            "| ms per token | "
            + " | ".join(f"{seconds / curve['rows'] * 1e3:.2f}" for seconds in curve["seconds"].values())
            + " |",
        ]
    return "\n".join(lines)


def _bench() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", level="INFO")
    result = decode(BenchSettings.from_command_line())
    print(table(result))  # noqa: T201 - the table
    print(json.dumps(result))  # noqa: T201 - the command's result


def main() -> None:
    """Entry point of `trm-bench`."""
    run_command(_bench, BenchSettings.command)
