"""The engine against other engines: transformers' `generate()` and llama.cpp, the same prompts and lengths, greedy.

Each way has a process of its own, which stays until the end; they take turns. The end token is ignored, so that
every way decodes the same number of tokens. Where a peer cannot run, the result says why.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from trm import checkpoint
from trm.bench.models import backbone_of, checkpoint_of, is_untrained
from trm.bench.settings import PeersSettings
from trm.bench.ways import Decode, Job, Memory, Run, Way, llama_cpp, ours, transformers
from trm.bench.workload import LONGEST_RATIO, make_requests
from trm.chat import ChatFormat
from trm.errors import ConfigError

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 2
BFLOAT16, FLOAT32 = "transformers, bfloat16", "transformers, float32"
LLAMA_CPP = "llama.cpp"
Raw = dict[str, Any]


def measure(settings: PeersSettings) -> Raw:
    """For one job and for many: what every way took, its memory, whose tokens are equal; and the ratios."""
    if settings.gguf is not None and not settings.gguf.is_file():
        raise ConfigError(f"--gguf {settings.gguf}: no such file")
    with checkpoint_of(settings.model, settings.shape) as directory, ExitStack() as stack:
        config = checkpoint.read_config(directory)
        efforts = sorted({0, config.n_supervision if settings.effort is None else settings.effort})
        untrained = is_untrained(directory)
        chat = ChatFormat(checkpoint.read_tokenizer(directory), config.normalize_text)
        sizes = _jobs(chat, settings)
        loaders, left_out = _loaders(directory, efforts, settings)
        ways: dict[str, Way] = {}
        for name, load in loaders.items():
            logger.info("loading %s", name)
            way = stack.enter_context(closing(Way(name, load)))
            try:
                way.run(replace(job, max_tokens=WARM_UP_TOKENS) for job in sizes["one"])
                ways[name] = way
            except ConfigError as error:
                if name.startswith("effort"):
                    raise
                left_out[name] = str(error)
        runs = {size: _runs(ways, jobs, settings.repeats) for size, jobs in sizes.items()}
        logger.info("float32, once, to compare tokens")
        exact = partial(transformers, str(backbone_of(directory)), "float32", settings.num_threads)
        with closing(Way(FLOAT32, exact)) as reference:
            raw = {size: _figures(jobs, runs[size], reference.run(jobs)[0].ids) for size, jobs in sizes.items()}
    return {
        "ratios": {size: ratios(found["ways"], efforts) for size, found in raw.items()},
        "model": settings.shape or settings.model or "bundled",
        "efforts": efforts,
        "untrained": untrained,
        "left_out": left_out,
        "requests": settings.num_requests,
        "dtype": settings.dtype,
        "quantize": settings.quantize,
        "raw": raw,
    }


def _jobs(chat: ChatFormat, settings: PeersSettings) -> dict[str, list[Job]]:
    """One question with the longest reply; and many, with replies of mixed length."""
    median_tokens = max(1, round(settings.max_tokens / LONGEST_RATIO))
    requests = make_requests(chat, settings.num_requests, [0], settings.seed, median_tokens)
    many = [Job(request.prompt_ids, min(request.params.max_tokens, settings.max_tokens)) for request in requests]
    return {"one": [replace(many[0], max_tokens=settings.max_tokens)], "many": many}


def _loaders(
    directory: Path, efforts: Sequence[int], settings: PeersSettings
) -> tuple[dict[str, Callable[[], Decode]], dict[str, str]]:
    """The ways that can run; and why others cannot."""
    threads, how = settings.num_threads, {"dtype": settings.dtype, "quantize": settings.quantize}
    loaders: dict[str, Callable[[], Decode]] = {
        f"effort {effort}": partial(ours, str(directory), effort, num_threads=threads, device="cpu", **how)
        for effort in efforts
    }
    loaders[BFLOAT16] = partial(transformers, str(backbone_of(directory)), "bfloat16", threads)
    if settings.gguf is None:
        return loaders, {LLAMA_CPP: "needs the same backbone as a GGUF file: --gguf FILE"}
    if find_spec("llama_cpp") is None:
        return loaders, {LLAMA_CPP: "needs llama-cpp-python, which is not installed: docs/decoding.md says how"}
    return loaders | {LLAMA_CPP: partial(llama_cpp, str(settings.gguf), threads)}, {}


def _runs(ways: Mapping[str, Way], jobs: Sequence[Job], repeats: int) -> dict[str, list[tuple[Run, Memory]]]:
    """All ways in turn on the same jobs, after a warm-up on their prompts."""
    logger.info("%d requests: warming up", len(jobs))
    for way in ways.values():
        way.run(replace(job, max_tokens=WARM_UP_TOKENS) for job in jobs)
    runs: dict[str, list[tuple[Run, Memory]]] = {name: [] for name in ways}
    for repeat in range(1, repeats + 1):
        for name, way in ways.items():
            logger.info("%d requests, run %d of %d: %s", len(jobs), repeat, repeats, name)
            runs[name].append(way.run(jobs))
    return runs


def _figures(jobs: Sequence[Job], runs: Mapping[str, list[tuple[Run, Memory]]], exact: list[list[int]]) -> Raw:
    """What the runs took, and how many replies are those of transformers in float32 (`exact`) and in bfloat16."""
    short = runs[BFLOAT16][-1][0].ids if BFLOAT16 in runs else None
    return {
        "requests": len(jobs),
        "tokens": sum(job.max_tokens for job in jobs),
        "prompt_tokens": sum(len(job.prompt_ids) for job in jobs),
        "ways": {
            name: {
                "seconds": [run.seconds for run, _ in found],
                "tokens_per_s": [run.tokens_per_s for run, _ in found],
                "decoding_tokens_per_s": [run.decoding_tokens_per_s for run, _ in found],
                "memory_bytes": asdict(found[-1][1]),
                "equal_to_float32": _num_equal(found[-1][0].ids, exact),
                "equal_to_bfloat16": short and _num_equal(found[-1][0].ids, short),
            }
            for name, found in runs.items()
        },
    }


def ratios(ways: Mapping[str, Raw], efforts: Sequence[int]) -> Raw:
    """Tokens per second of ours, effort by effort, over those of each other way: medians of the runs."""
    return {
        f"effort {effort}": {
            other: {
                kind: median(ways[f"effort {effort}"][kind]) / median(ways[other][kind])
                for kind in ("decoding_tokens_per_s", "tokens_per_s")
            }
            for other in ways
            if not other.startswith("effort")
        }
        for effort in efforts
    }


def table(result: Raw) -> str:
    """The result for people: a table for one request, one for many, and what was left out."""
    lines = [
        f"{result['model']}, {result['threads']} threads, --dtype {result['dtype']}"
        + (f", --quantize {result['quantize']}" if result["quantize"] else "")
        + f", torch {result['torch']}"
        + "; the decoder is untrained, so every effort gives the backbone's tokens" * result["untrained"]
    ]
    for size, raw in result["raw"].items():
        count, ratio = raw["requests"], result["ratios"][size]
        lines += [
            "",
            f"| {count} request{'s' * (count > 1)}, {raw['prompt_tokens']} + {raw['tokens']} tokens "
            "| decoding, tokens/s | whole, tokens/s | "
            + " | ".join(f"{name} / this: decoding, whole" for name in ratio)
            + " | memory at its peak, at the end (MB) | replies as transformers': float32, bfloat16 |",
            "|---|---|---|" + "---|" * len(ratio) + "---|---|",
        ]
        for name, way in raw["ways"].items():
            shares = [
                f"{of[name]['decoding_tokens_per_s']:.2f}, {of[name]['tokens_per_s']:.2f}" if name in of else ""
                for of in ratio.values()
            ]
            memory = way["memory_bytes"]
            lines.append(
                f"| {name} | {median(way['decoding_tokens_per_s']):.1f} | {median(way['tokens_per_s']):.1f} | "
                + " | ".join(shares)
                + f" | {memory['peak'] / 1e6:.0f}, {memory['resident'] / 1e6:.0f} "
                f"| {way['equal_to_float32']}, {way['equal_to_bfloat16']} of {count} |"
            )
    lines += [f"\nLeft out: {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def _num_equal(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    return sum(one == other for one, other in zip(ours, theirs, strict=True))
