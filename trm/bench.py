"""`trm-bench`: what batching in depth buys, as ratios within one run, with the controls beside it.

Requests have mixed prompt and output lengths, drawn from a seed. The controls decode the same
requests through transformers' `generate()`: one at a time, and in static batches in arrival
order. Ends with one JSON line that holds the raw counts and times beside the ratios.
"""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic_settings import CliPositionalArg

from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.chat import ChatFormat, solve_messages
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.settings import Settings, run_command

SENTENCES = (
    "Tom has {a} apples.",
    "He buys {b} more apples at the store.",
    "Then he gives {c} apples to Anna.",
    "The next day, he finds {a} apples in the park.",
    "His sister gives him {b} apples.",
    "After that, he sells {c} of them.",
)
QUESTION = "How many apples does Tom have now?"


class BenchSettings(Settings):
    """Measure decoding: the engine against generate(), one at a time and in static batches."""

    command: ClassVar[str] = "trm-bench"

    benchmark: CliPositionalArg[Literal["decode"]] = Field(description="what to measure")
    model: str | None = Field(None, description="checkpoint directory or hub id; default the bundled model")
    num_requests: int = Field(64, ge=1, description="requests to decode")
    max_rows: int = Field(32, ge=1, description="rows decoded together")
    effort: int | None = Field(None, ge=0, description="supervision steps; default the model's trained number")
    repeats: int = Field(3, ge=1, description="timed runs of each way, after one warm-up; the median counts")
    num_threads: int = Field(2, ge=1, description="CPU threads")
    seed: int = Field(0, ge=0, description="of the requests")


def make_requests(chat: ChatFormat, count: int, effort: int, seed: int) -> list[Request]:
    """Prompts of one to six sentences, replies of 8 to 96 tokens; the end token is ignored, so lengths are known."""
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        story = " ".join(SENTENCES[: rng.randint(1, len(SENTENCES))])
        numbers = {name: rng.randint(2, 40) for name in "abc"}
        prompt = chat.encode(solve_messages(f"{story.format(**numbers)} {QUESTION}"))
        params = SamplingParams(max_tokens=rng.randint(8, 96), n_supervision=effort, ignore_eos=True)
        requests.append(Request(tuple(prompt), params))
    return requests


def decode_with_engine(engine: Engine, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    return [reply.token_ids for reply in engine.generate(requests)]


def decode_with_generate(
    model: TRMForCausalLM, requests: Sequence[Request], batch_size: int, pad_id: int
) -> list[tuple[int, ...]]:
    """Static batches through transformers: every row is decoded to the longest reply of its batch."""
    replies: list[tuple[int, ...]] = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        width = max(len(r.prompt_ids) for r in batch)
        longest = max(r.params.max_tokens for r in batch)
        ids = torch.tensor([[pad_id] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in batch])
        mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in batch])
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=pad_id,
            n_supervision=batch[0].params.n_supervision,
        )
        replies += [tuple(row[: r.params.max_tokens]) for row, r in zip(out[:, width:].tolist(), batch, strict=True)]
    return replies


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, list[float]]:
    """The last result and the seconds of each timed run, after one that is not timed."""
    result = run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    return result, seconds


def decode(settings: BenchSettings) -> dict[str, Any]:
    """Run the decoding benchmark; returns what the JSON line holds."""
    torch.set_num_threads(settings.num_threads)
    source = settings.model or str(bundled_model_path())
    model = TRMForCausalLM.from_pretrained(source, dtype=torch.float32)
    chat = ChatFormat(checkpoint.read_tokenizer(source), model.config.normalize_text)
    effort = model.check_effort(settings.effort)
    requests = make_requests(chat, settings.num_requests, effort, settings.seed)
    pad_id = chat.tokenizer.pad_token_id or 0
    longest = max(r.positions for r in requests)
    engine = Engine(model, chat, EngineConfig(settings.max_rows, max_model_len=longest, max_queue=len(requests)))

    continuous, engine_s = timed(lambda: decode_with_engine(engine, requests), settings.repeats)
    static, static_s = timed(lambda: decode_with_generate(model, requests, settings.max_rows, pad_id), settings.repeats)
    alone, alone_s = timed(lambda: decode_with_generate(model, requests, 1, pad_id), 1)
    tokens = sum(r.params.max_tokens for r in requests)
    medians = {
        name: statistics.median(s) for name, s in (("engine", engine_s), ("static", static_s), ("alone", alone_s))
    }
    return {
        "benchmark": "decode",
        "effort": effort,
        "num_requests": len(requests),
        "tokens": tokens,
        "engine_s": engine_s,
        "static_s": static_s,
        "sequential_s": alone_s,
        "tokens_per_s": tokens / medians["engine"],
        "continuous_vs_sequential": medians["alone"] / medians["engine"],
        "continuous_vs_static": medians["static"] / medians["engine"],
        "requests_equal_to_sequential": sum(a == b for a, b in zip(continuous, alone, strict=True)),
        "static_requests_equal_to_sequential": sum(a == b for a, b in zip(static, alone, strict=True)),
        "max_rows": settings.max_rows,
        "threads": settings.num_threads,
        "seed": settings.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


def _bench() -> None:
    result = decode(BenchSettings.from_command_line())
    rows = (
        ("one at a time, generate()", "sequential_s"),
        ("static batches, generate()", "static_s"),
        ("engine", "engine_s"),
    )
    for label, key in rows:
        seconds = statistics.median(result[key])
        print(f"{label:28} {seconds:8.2f} s {result['tokens'] / seconds:8.1f} tokens/s")  # noqa: T201 - the table
    print(json.dumps(result))  # noqa: T201 - the command's result


def main() -> None:
    """Entry point of `trm-bench`."""
    run_command(_bench, BenchSettings.command)
