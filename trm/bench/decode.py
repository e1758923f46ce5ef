"""What batching in depth, halting and drafting buy. Every part returns raw counts and times; `ratios` divides them."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from trm.bench import roofline
from trm.bench.halting import agreements, loosest
from trm.bench.models import checkpoint_of, is_untrained
from trm.bench.settings import DecodeSettings
from trm.bench.workload import (
    MEDIAN_TOKENS,
    Decoded,
    LockstepScheduler,
    TokenIds,
    decode_with_engine,
    decode_with_generate,
    in_turn,
    load,
    make_requests,
    model_time,
    with_params,
)
from trm.chat import ChatFormat
from trm.engine import Engine, EngineConfig, Request
from trm.engine.runner import Chunk, Runner
from trm.engine.slots import Span
from trm.errors import ConfigError
from trm.loading import prepare_for_decoding
from trm.model import TRMForCausalLM

logger = logging.getLogger(__name__)

MIXED_EFFORTS = (1, 4, 8, 16)
HALTING_EFFORT = 16
LEAST_AGREEMENT = 0.995
# What all requests may take one after another. Beyond the first they are cut down to the second: all parts together
# take about 30 times as long.
ENOUGH_S, SCALED_S = 60.0, 6.0
PROMPT_TOKENS = 80  # of an average question
LEAST_REQUESTS, LEAST_TOKENS = 4, 16  # however slow the model
SINGLE_ROW_REQUESTS = 24  # decoded one after another: enough to measure drafting
CONTEXTS = (64, 128, 256, 512, 1024, 2048)
CURVE_ROWS = 8
Raw = dict[str, Any]


def measure(settings: DecodeSettings) -> Raw:
    """Part by part: their raw counts and times, and the ratios that these come to."""
    with checkpoint_of(settings.model, settings.shape) as directory:
        how = {"device": settings.device, "dtype": settings.dtype, "quantize": settings.quantize}
        model, chat = load(str(directory), settings.num_threads, **how)
        untrained = is_untrained(directory)
    if model.config.kv_source != "context":
        raise ConfigError("this model has kv_source 'state' and cannot halt early; choose one with kv_source 'context'")
    logger.info("measuring the machine, and rounds of decoding")
    raw: Raw = {
        "roofline": roofline.measure(model, chat, settings.max_rows, settings.quantize, settings.repeats),
    }
    num_requests, median_tokens = affordable(settings.num_requests, raw["roofline"])
    bench = DecodeBench(model, chat, settings, num_requests, median_tokens)
    parts: dict[str, Callable[[], Raw]] = {
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
    for number, (name, part) in enumerate(parts.items(), start=1):
        logger.info("part %d of %d: measuring %s", number, len(parts), name)
        started = time.perf_counter()
        raw[name] = part()
        logger.info("part %d of %d took %.0f s", number, len(parts), time.perf_counter() - started)
    return {
        **ratios(raw),
        "model": settings.shape or settings.model or "bundled",
        "dtype": str(model.decoder.halt_head.weight.dtype).removeprefix("torch."),
        "quantize": settings.quantize,
        "device": str(model.device),
        "untrained": untrained,
        "requests": num_requests,
        "median_tokens": median_tokens,
        "raw": raw,
    }


def affordable(num_requests: int, measured: Raw) -> tuple[int, int]:
    """How many requests, and the median length of their replies, for what `roofline.measure` has found.

    All that is wanted if they take ENOUGH_S one after another; else fewer and shorter ones, which take SCALED_S.
    """
    single = measured["lines"][1]  # one row at the trained effort
    token_s, prompt_s = single["round_s"], single["prompt_s"] * PROMPT_TOKENS / measured["context"]
    if num_requests * (prompt_s + MEDIAN_TOKENS * token_s) <= ENOUGH_S:
        return num_requests, MEDIAN_TOKENS
    count = int(SCALED_S / (prompt_s + LEAST_TOKENS * token_s))
    count = max(LEAST_REQUESTS, min(num_requests, count))
    tokens = int((SCALED_S / count - prompt_s) / token_s)
    return count, max(LEAST_TOKENS, min(MEDIAN_TOKENS, tokens))


class DecodeBench:
    """One model and one set of requests; one part of the benchmark per method."""

    def __init__(
        self,
        model: TRMForCausalLM,
        chat: ChatFormat,
        settings: DecodeSettings,
        num_requests: int,
        median_tokens: int = MEDIAN_TOKENS,
    ) -> None:
        self.model, self.chat, self.median_tokens = model, chat, median_tokens
        self.max_rows, self.repeats, self.seed = settings.max_rows, settings.repeats, settings.seed
        self.requests = make_requests(chat, num_requests, [model.config.n_supervision], self.seed, median_tokens)
        self.longest = max(request.positions for request in self.requests)
        self.pad_id = chat.tokenizer.pad_token_id or 0

    def engine(self, max_rows: int | None = None, **config: Any) -> Engine:
        sizes = {"max_model_len": self.longest, "max_queue": len(self.requests)}
        return Engine(self.model, self.chat, EngineConfig(max_rows or self.max_rows, **(sizes | config)))

    def throughput(self) -> Raw:
        """The engine against `generate()`, in static batches and one request at a time; all at the trained effort."""
        engine = self.engine()
        replies, seconds = in_turn(
            {
                "engine": lambda: decode_with_engine(engine, self.requests).replies,
                "static": lambda: decode_with_generate(self.model, self.requests, self.max_rows, self.pad_id),
            },
            self.repeats,
        )
        started = time.perf_counter()
        alone = decode_with_generate(self.model, self.requests, 1, self.pad_id)
        return {
            "effort": self.model.config.n_supervision,
            "tokens": sum(request.params.max_tokens for request in self.requests),
            "engine_s": seconds["engine"],
            "static_s": seconds["static"],
            "sequential_s": [time.perf_counter() - started],
            "requests_equal_to_sequential": _num_equal(replies["engine"], alone),
            "static_requests_equal_to_sequential": _num_equal(replies["static"], alone),
        }

    def mixed_effort(self) -> Raw:
        """Efforts in turn, more requests and shorter replies, so that the rows are full; nobody drafts.

        Rows free in depth, against lockstep: every row takes the steps of the deepest, as a rectangular
        batch does. Two more controls: shallow rows wait for the deepest without computing; and one effort
        after another, which needs to know all requests beforehand.
        """
        limit = self.model.config.max_supervision
        efforts = [min(effort, limit) for effort in MIXED_EFFORTS]
        count, median_tokens = 4 * len(self.requests), self.median_tokens // 4
        requests = make_requests(self.chat, count, efforts, self.seed, median_tokens)
        deepest = with_params(requests, n_supervision=max(efforts))
        sizes = {"max_model_len": max(r.positions for r in requests), "max_queue": count, "max_draft_tokens": 0}
        free, rectangular, waiting, grouped = (self.engine(**sizes) for _ in range(4))
        waiting.loop.scheduler = LockstepScheduler(self.max_rows, count)
        by_effort = [requests[start :: len(efforts)] for start in range(len(efforts))]
        ways: dict[str, Callable[[], list[Decoded]]] = {
            "continuous": lambda: [decode_with_engine(free, requests)],
            "lockstep": lambda: [decode_with_engine(rectangular, deepest)],
            "waiting": lambda: [decode_with_engine(waiting, requests)],
            "grouped": lambda: [decode_with_engine(grouped, group) for group in by_effort],
        }
        runs, seconds = in_turn(ways, self.repeats)
        return {
            "requests": count,
            "efforts": efforts,
            **{f"{name}_s": seconds[name] for name in runs},
            **{name: runs[name][0].counters for name in ("continuous", "lockstep", "waiting")},
            "requests_equal": _num_equal(runs["continuous"][0].replies, runs["waiting"][0].replies),
        }

    def speculation(self, max_rows: int) -> Raw:
        """The same requests, up to their end tokens, with and without drafts."""
        whole = with_params(self.requests if max_rows > 1 else self.requests[:SINGLE_ROW_REQUESTS], ignore_eos=False)
        requests = self._up_to_the_end(whole, decode_with_engine(self.engine(), whole).replies)
        engines = {"with": self.engine(max_rows), "without": self.engine(max_rows, max_draft_tokens=0)}
        runs, seconds = in_turn(
            {name: partial(decode_with_engine, engine, requests) for name, engine in engines.items()},
            self.repeats,
        )
        return {
            "requests": len(requests),
            "effort": self.model.config.n_supervision,
            "with_s": seconds["with"],
            "without_s": seconds["without"],
            "with": runs["with"].counters,
            "without": runs["without"].counters,
            "requests_equal": _num_equal(runs["with"].replies, runs["without"].replies),
        }

    def halting(self) -> Raw:
        """Full depth against the loosest tolerance that agrees with it nearly everywhere; nobody drafts."""
        effort = min(HALTING_EFFORT, self.model.config.max_supervision)
        full = with_params(self.requests, n_supervision=effort, ignore_eos=False)
        engine = self.engine(max_draft_tokens=0)
        replies = decode_with_engine(engine, full).replies
        table = agreements(
            self.model, [(request.prompt_ids, ids) for request, ids in zip(full, replies, strict=True)], effort
        )
        chosen = loosest(table, LEAST_AGREEMENT)
        same_length = self._up_to_the_end(full, replies)
        halted = with_params(same_length, halt_tolerance=chosen.tolerance)
        runs, seconds = in_turn(
            {
                "full": partial(decode_with_engine, engine, same_length),
                "halted": partial(decode_with_engine, engine, halted),
            },
            self.repeats,
        )
        return {
            "effort": effort,
            "least_agreement": LEAST_AGREEMENT,
            "table": [asdict(row) for row in table],
            "chosen": asdict(chosen),
            "full_s": seconds["full"],
            "halted_s": seconds["halted"],
            "full_steps": runs["full"].supervision_steps,
            "halted_steps": runs["halted"].supervision_steps,
            "tokens": runs["full"].counters["generation_tokens"],
            "requests_equal": _num_equal(runs["full"].replies, runs["halted"].replies),
        }

    def overhead(self) -> Raw:
        """Seconds inside the model's calls, of all seconds, as many requests as rows; other requests each time."""
        seeds = range(self.seed + 1, self.seed + 2 + self.repeats)
        others = [make_requests(self.chat, self.max_rows, [self.model.config.n_supervision], seed) for seed in seeds]
        batches = [with_params(requests, max_tokens=self.median_tokens) for requests in others]
        engine = self.engine(max_model_len=max(request.positions for batch in batches for request in batch))
        total, inside = [], []
        for requests in batches:
            with model_time(self.model) as seconds:
                total.append(decode_with_engine(engine, requests).seconds)
            inside.append(seconds[0])
        return {"rows": self.max_rows, "total_s": total[1:], "model_s": inside[1:]}

    def _up_to_the_end(self, requests: Sequence[Request], replies: Sequence[TokenIds]) -> list[Request]:
        """The same requests, each to be decoded to the length of its reply: no token behind an end token."""
        return [
            with_params([request], max_tokens=len(ids), ignore_eos=True)[0]
            for request, ids in zip(requests, replies, strict=True)
        ]


def reference_sizes() -> Raw:
    """One row on one thread at the sizes that the ancestor was measured at: D = 256, 4 layers, 336 block calls a token.

    Random weights; times only. No drafts, so every token pays for all its steps.
    """
    backbone = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    )
    threads, prompt, tokens = torch.get_num_threads(), 232, 24
    torch.set_num_threads(1)
    found: Raw = {"tokens": tokens, "context": prompt + tokens}
    try:
        for kv_source in ("context", "state"):
            model = TRMForCausalLM.from_backbone(backbone, kv_source=kv_source).eval()
            prepare_for_decoding(model)
            runner = Runner(model, 1, prompt + tokens + 1, model.config.cache_entries(model.config.n_supervision))
            runner.encode([Chunk(0, 0, [0] * prompt, steps=model.config.n_supervision)])
            started = time.perf_counter()
            for position in range(prompt, prompt + tokens):
                _decode_token(runner, [0], position, model.config.n_supervision)
            found[f"{kv_source}_s"] = time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
    return found


def context_curve(model: TRMForCausalLM, kv_source: str, repeats: int) -> Raw:
    """Seconds per round of tokens of 8 rows at one context length after another, and the bytes read for it.

    The cache is read once per call of a layer: by the backbone's once per token, by the recursion's
    in every call. With keys from the state the decoder's weights are fresh, which changes no time.
    """
    if kv_source != model.config.kv_source:
        settings = {
            name: getattr(model.config, name)
            for name in ("n_latent", "n_cycles", "n_supervision", "n_layers", "expansion")
        }
        model = TRMForCausalLM.from_backbone(model.backbone, kv_source=kv_source, **settings).eval()
        prepare_for_decoding(model.to(model.dtype))
    config = model.config
    longest = min(max(CONTEXTS), config.max_position_embeddings - 1)
    runner = Runner(model, CURVE_ROWS, longest + 1, config.cache_entries(config.n_supervision))
    calls = config.backbone_config.num_hidden_layers + config.n_supervision * config.calls_per_step * config.n_layers
    heads = config.backbone_config.num_key_value_heads
    seconds = {}
    for context in [length for length in CONTEXTS if length <= longest]:
        times = []
        for _ in range(1 + 3 * repeats):
            started = time.perf_counter()
            _decode_token(runner, range(CURVE_ROWS), context - 1, config.n_supervision)
            times.append(time.perf_counter() - started)
        seconds[context] = statistics.median(times[1:])
    return {
        "rows": CURVE_ROWS,
        "bytes_per_position": calls * CURVE_ROWS * 2 * heads * config.head_dim * runner.slots.keys.element_size(),
        "seconds": seconds,
    }


def _decode_token(runner: Runner, slots: Sequence[int], position: int, steps: int) -> None:
    """One token of each slot, at one position: backbone, recursion, head."""
    runner.encode([Chunk(slot, position, [0], place=0) for slot in slots])
    for step in range(steps):
        runner.tick([Span(slot, position) for slot in slots], [step] * len(slots))
    float(runner.logits(slots)[0, 0])  # which waits for the device


def ratios(raw: Raw) -> dict[str, float]:
    """The figures that the raw counts and times of all parts come to."""
    median = statistics.median
    throughput, mixed, halting, overhead = (raw[part] for part in ("throughput", "mixed_effort", "halting", "overhead"))
    single, many = raw["speculation_1_row"], raw["speculation_all_rows"]
    return {
        "continuous_vs_sequential": median(throughput["sequential_s"]) / median(throughput["engine_s"]),
        "continuous_vs_static": median(throughput["static_s"]) / median(throughput["engine_s"]),
        "mixed_effort_vs_lockstep": median(mixed["lockstep_s"]) / median(mixed["continuous_s"]),
        "mixed_effort_vs_waiting": median(mixed["waiting_s"]) / median(mixed["continuous_s"]),
        "mixed_effort_vs_grouped": median(mixed["grouped_s"]) / median(mixed["continuous_s"]),
        "ideal_row_steps": mixed["continuous"]["row_steps"] / mixed["continuous"]["row_places"],
        "speculation_1_row": median(single["without_s"]) / median(single["with_s"]),
        "speculation_32_rows": median(many["without_s"]) / median(many["with_s"]),
        "halting_speedup": median(halting["full_s"]) / median(halting["halted_s"]),
        "halting_agreement": halting["chosen"]["agreeing"] / halting["chosen"]["positions"],
        "overhead_share_32_rows": 1 - sum(overhead["model_s"]) / sum(overhead["total_s"]),
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
        f"{result['model']} in {result['quantize'] or result['dtype']} on {result['device']}: {count} requests, "
        f"{tokens} tokens, {rows} rows, {result['threads']} threads, torch {result['torch']}",
        *_remarks(result),
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
    lines += ["", roofline.table(raw["roofline"])]
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


def _remarks(result: Raw) -> list[str]:
    """What is to be known before the figures are believed."""
    remarks = []
    if result["median_tokens"] < MEDIAN_TOKENS:
        remarks.append(
            f"The model is slow here, so there are only {result['requests']} requests, "
            f"with replies of {result['median_tokens']} tokens in the median instead of {MEDIAN_TOKENS}."
        )
    if result["untrained"]:
        remarks.append("The decoder is untrained, so drafts are always right and one step is as good as all.")
    return remarks


def _num_equal(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    return sum(one == other for one, other in zip(ours, theirs, strict=True))
