"""The engine on a device: milliseconds a token and its share of the floor, what waits, what is captured, memory.

Replayed calls against calls that are launched kernel by kernel, greedy, sampled and drafted, 1 to 128 rows. Decoding is
timed from when every row has its first tokens, so prompts are not in it.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from tests.gpu.measures import (
    DEVICE,
    ON_GPU,
    ROWS,
    Put,
    Raw,
    at_least,
    at_most,
    attempt,
    bundled_chat,
    empty_cache,
    let_backbone_decide,
    machine_of,
    random_model,
    timed,
    wait,
)
from trm import TRMForCausalLM
from trm.bench.roofline import Machine, work
from trm.chat import ChatFormat, solve_messages
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.engine import engine as engine_module
from trm.engine.handle import Handle
from trm.engine.runner import Chunk, Runner
from trm.engine.sampling import Ask
from trm.engine.slots import Span
from trm.engine.static import StaticRunner, default_buckets
from trm.loading import prepare_for_decoding

MANY = 32 if ON_GPU else 2  # rows that are sampled
MAX_LEN = 512 if ON_GPU else 256
PROMPT = 140 if ON_GPU else 20  # tokens; with the reply it stays within one width of what is captured
WARM_UP = 3  # tokens of each row
SLACK = 64  # tokens that first rows may decode until the last one has its prompt
GAP_US = 5.0  # kernels of one graph follow each other faster; a device that waits for the host waits longer
DRAFT = 7
COUNTED = ("draft_tokens", "accepted_tokens")
KINDS: dict[str, Raw] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7, "seed": 1},
    "temperature, top_p": {"temperature": 0.7, "top_p": 0.95, "seed": 1},
    "temperature, top_k": {"temperature": 0.7, "top_k": 50, "seed": 1},
}


def engine(put: Put, report: Raw, shape: str, quantize: str | None = None) -> None:
    """A shape with random weights: what the targets need first, then launching kernel by kernel, then single calls."""
    machine, chat = machine_of(report), bundled_chat()
    model = prepare_for_decoding(random_model(shape), quantize)
    found: dict[int, Raw] = {}
    for rows in dict.fromkeys((1, ROWS[-1], MANY, *ROWS)):
        kinds = KINDS if rows == MANY else {"greedy": KINDS["greedy"]}
        found[rows] = decoded(put, f"replayed, {rows} rows", model, chat, rows, kinds, machine)
        put("targets", targets(shape, found))
    for rows in dict.fromkeys((1, ROWS[-1], *ROWS)):
        kinds = {"greedy": KINDS["greedy"]}
        decoded(put, f"kernel by kernel, {rows} rows", model, chat, rows, kinds, machine, eager=True)
    for rows in ROWS:
        attempt(put, f"calls, {rows} rows", partial(calls, model, rows))
    let_backbone_decide(model)
    kinds = {"greedy, every draft right": KINDS["greedy"]}
    decoded(put, "drafts, 1 rows", model, chat, 1, kinds, machine, draft=DRAFT)


def targets(shape: str, found: dict[int, Raw]) -> list[Raw]:
    """What the project wants of a shape beside what was measured so far."""

    def number(rows: int, name: str, kind: str = "greedy") -> Any:
        return found.get(rows, {}).get(kind, {}).get(name)

    many, greedy = ROWS[-1], number(MANY, "token_ms")
    sampled = {kind: number(MANY, "token_ms", kind) for kind in KINDS if kind != "greedy"}
    lines = [
        at_most(f"{MANY} rows, {kind}: over greedy", 1.15, ms / greedy if ms and greedy else None)
        for kind, ms in sampled.items()
    ]
    if shape == "qwen2.5-1.5b":
        lines.append(at_most("one row: ms a token", 10, number(1, "token_ms")))
        lines.append(at_least(f"{many} rows: share of the bound", 0.5, number(many, "share_of_bound")))
    else:
        lines.append(at_most("one row: ms a token", 3, number(1, "token_ms")))
        lines.append(at_least(f"{many} rows: tokens a second", 20_000, number(many, "tokens_per_s")))
    for rows, its in found.items():
        lines.append(at_most(f"{rows} rows: waiting share", 0.05, number(rows, "waiting_share")))
        lines.append(at_most(f"{rows} rows: functions not captured", 0, its.get("not_captured")))
        lines.append(at_most(f"{rows} rows: engine's start to first token, s", 20, its.get("first_token_s")))
    return lines


def decoded(
    put: Put,
    name: str,
    model: TRMForCausalLM,
    chat: ChatFormat,
    rows: int,
    kinds: dict[str, Raw],
    machine: Machine,
    *,
    eager: bool = False,
    draft: int = 0,
    prompts: Sequence[Sequence[int]] = (),
) -> Raw:
    """One engine of so many rows, and how it decodes each kind of request. Returns what `put` was given."""
    found: Raw = {}
    try:
        with started(model, chat, rows, draft, eager) as (made, start):
            found |= start
            put(name, found)
            for kind, params in kinds.items():
                requests = list(wanted(rows, model.config.n_supervision, prompts, **params))

                def put_kind(_: str, numbers: Any, kind: str = kind) -> None:
                    found[kind] = numbers
                    put(name, found)

                attempt(put_kind, kind, partial(decode, made, requests, machine, draft))
            found |= captures(made) | memory(made)
    except Exception as error:  # noqa: BLE001 - whatever it was, the rest is measured
        found["failed"] = f"{type(error).__name__}: {error}"
    put(name, found)
    empty_cache()
    return found


@contextlib.contextmanager
def started(
    model: TRMForCausalLM, chat: ChatFormat, rows: int, draft: int, eager: bool
) -> Iterator[tuple[Engine, Raw]]:
    """An engine, and what its start took up to the first token of a request.

    Replayed on a GPU, and on a CPU between the same buffers. `eager`: with the plain runner.
    """
    config = EngineConfig(
        max_rows=rows,
        max_model_len=MAX_LEN,
        max_draft_tokens=draft,
        row_buckets=None if eager else default_buckets(rows, draft),
    )
    empty_cache()
    began = time.perf_counter()
    with patch.object(engine_module, "default_buckets", return_value=None):  # a GPU would choose some by itself
        made = Engine(model, chat, config)
    try:
        assert isinstance(made.loop.runner, StaticRunner) != eager
        ready_s = time.perf_counter() - began
        first = Request(tuple(range(5, 5 + PROMPT)), SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
        made.generate([first])
        start = {"ready_s": ready_s, "first_token_s": time.perf_counter() - began}
        yield made, start | captures(made)
    finally:
        made.close()


def captures(made: Engine) -> Raw:
    """What was captured, and what could not be."""
    runner = made.loop.runner
    if not isinstance(runner, StaticRunner):
        return {}
    graphs = runner.graphs
    return {
        "captures": graphs.count - graphs.plain,
        "capture_s": graphs.seconds,
        "capture_mb": graphs.bytes / 1e6,
        "not_captured": graphs.plain,
    }


def memory(made: Engine) -> Raw:
    """Megabytes of the slots, of torch's tensors at the peak, and of all that is taken on the device."""
    found: Raw = {"slots_mb": made.stats().kv_cache_bytes / 1e6}
    if ON_GPU:
        free, total = torch.cuda.mem_get_info(DEVICE)
        found |= {"peak_mb": torch.cuda.max_memory_allocated(DEVICE) / 1e6, "taken_mb": (total - free) / 1e6}
    return found


def wanted(rows: int, effort: int, prompts: Sequence[Sequence[int]], **params: Any) -> Iterator[Request]:
    """A request for each row, which goes on past the end token. Made-up prompts share nothing with each other."""
    most = SLACK + sum(parts_of(effort))
    for row in range(rows):
        ids = prompts[row % len(prompts)] if prompts else [5 + (row * 31 + place * 7) % 1000 for place in range(PROMPT)]
        yield Request(tuple(ids), SamplingParams(max_tokens=most, n_supervision=effort, ignore_eos=True, **params))


def parts_of(effort: int) -> tuple[int, int, int]:
    """Tokens of each row before the clock starts, those that are timed, and those that are profiled after that.

    Deep ones take long, and are thousands of kernels each.
    """
    return (WARM_UP, max(12, 128 // max(1, effort)), max(2, 32 // max(1, effort))) if ON_GPU else (WARM_UP, 4, 1)


def decode(made: Engine, requests: Sequence[Request], machine: Machine, draft: int = 0) -> Raw:
    """Milliseconds a token of each row, and what bounds them. Everything is captured when the clock starts.

    share_of_bound: of the time that reading or computing alone would take at the card's own rates. waiting_share: of
    the time in which the device waits for the host; idle_share: in which it runs no kernel, short gaps included.
    """
    effort = requests[0].params.n_supervision or 0
    unclocked, clocked, profiled = parts_of(effort)
    with running(made, requests) as handles:  # captures what is missing, and leaves the prompts in the cache
        advance(made, handles, unclocked + clocked + profiled)
    before = asdict(made.stats())
    with running(made, requests) as handles:
        advance(made, handles, unclocked)
        seconds, tokens = advance(made, handles, clocked)
        found: Raw = {"token_ms": 1e3 * seconds * len(requests) / tokens, "tokens_per_s": tokens / seconds}
        length = sum(len(request.prompt_ids) for request in requests) // len(requests)
        size = made.model.backbone.dtype.itemsize
        weight_size = 1 if has_fp8_layers(made.model) else size
        parts = work(made.model.config, len(requests), length, effort, weight_size, size)
        found["bound_ms"] = 1e3 * sum(part.floor_s(machine) for part in parts.values())
        found["share_of_bound"] = found["bound_ms"] / found["token_ms"]
        if ON_GPU:  # a profiler that is not allowed costs its own numbers only
            attempt(lambda _, numbers: found.update(numbers), "idle", partial(idle, made, handles, profiled))
    after = asdict(made.stats())
    return found | ({name: after[name] - before[name] for name in COUNTED} if draft else {})


def has_fp8_layers(model: TRMForCausalLM) -> bool:
    """Whether linear layers of the backbone are held in float8."""
    return any(type(module).__name__ == "Fp8Linear" for module in model.backbone.modules())


@contextlib.contextmanager
def running(made: Engine, requests: Sequence[Request]) -> Iterator[list[Handle]]:
    """Requests that the engine has accepted, cancelled at the end."""
    handles = made.submit(requests, lambda index, event: None)
    try:
        yield handles
    finally:
        for handle in handles:
            handle.cancel()
        while made.step():
            pass


def advance(made: Engine, handles: Sequence[Handle], tokens: int) -> tuple[float, int]:
    """Decode so many tokens more for every row; returns the seconds, and the tokens of all rows together."""
    before = [len(handle.row.reply) for handle in handles]
    least = min(before) + tokens
    wait()
    began = time.perf_counter()
    while min(len(handle.row.reply) for handle in handles) < least:
        if not made.step():
            raise RuntimeError(f"rows ended after {[len(handle.row.reply) for handle in handles]} tokens: see the log")
    wait()
    seconds = time.perf_counter() - began
    return seconds, sum(len(handle.row.reply) for handle in handles) - sum(before)


def idle(made: Engine, handles: Sequence[Handle], tokens: int) -> Raw:
    """Shares of the time in which no kernel runs, from the first one to the last: all gaps, and those of `GAP_US`.

    The profiler itself slows launching down, so both are upper bounds.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        advance(made, handles, tokens)
    kernels = (
        (event.time_range.start, event.time_range.end)
        for event in profiled.events() or ()
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    )
    return shares(kernels)


def shares(kernels: Iterable[tuple[float, float]]) -> Raw:
    """Idle and waiting share of spans of microseconds, which may overlap."""
    busy: list[tuple[float, float]] = []
    for start, end in sorted(kernels):
        if busy and start <= busy[-1][1]:
            busy[-1] = busy[-1][0], max(end, busy[-1][1])
        else:
            busy.append((start, end))
    if not busy:
        return {"idle_share": None, "waiting_share": None}
    whole = busy[-1][1] - busy[0][0]
    gaps = [after[0] - before[1] for before, after in pairwise(busy)]
    return {
        "idle_share": sum(gaps) / whole,
        "waiting_share": sum(gap for gap in gaps if gap >= GAP_US) / whole,
    }


def calls(model: TRMForCausalLM, rows: int) -> Raw:
    """Milliseconds of backbone, tick and choice one by one, waited for: kernel by kernel, and replayed."""
    sizes = model, rows, PROMPT + 1, model.config.cache_entries(model.config.n_supervision)
    found: Raw = {}
    for name, runner in (("kernel by kernel", Runner(*sizes)), ("replayed", StaticRunner(*sizes, buckets=(rows,)))):
        runner.exact = False  # one bucket alone would mean exactness
        found[name] = of_token(runner, rows)
    return found


def of_token(runner: Runner, rows: int) -> Raw:
    """Milliseconds of the calls for one token of each row."""
    slots = range(rows)
    chunks = [Chunk(slot, PROMPT, [7], place=0) for slot in slots]
    spans = [Span(slot, PROMPT) for slot in slots]
    asks = {kind: [Ask(SamplingParams(**params), PROMPT)] * rows for kind, params in KINDS.items()}
    found = {
        "backbone_ms": timed(lambda: runner.encode(chunks)),
        "tick_ms": timed(lambda: runner.tick(spans, [1] * rows)),
    }
    for kind, some in asks.items():
        found[f"choice_ms, {kind}"] = timed(partial(runner.choose, slots, [0] * rows, some))
    found["token_ms"] = (
        found["backbone_ms"] + runner.model.config.n_supervision * found["tick_ms"] + found["choice_ms, greedy"]
    )
    return found


def questions(chat: ChatFormat, num: int) -> list[tuple[int, ...]]:
    """Prompts of word problems."""
    words = (f"Tom has {n + 2} apples and buys {3 * n + 1} more. How many apples has he?" for n in range(num))
    return [tuple(chat.encode(solve_messages(question))) for question in words]


def seconds_of_process() -> float:
    """Since this process began."""
    return time.time() - psutil.Process().create_time()
