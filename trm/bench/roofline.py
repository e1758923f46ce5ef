"""How close a round of decoding comes to what the machine could do, and where the rest of its time goes.

A round is one token of every row. What it has to read and to compute is counted from the configuration. How fast this
machine reads and multiplies is measured beside it. The floor is the time of the slower of the two, part by part. A
share above 1 means that weights came from the processor's own cache, which is faster than memory.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trm.chat import ChatFormat
from trm.config import TRMConfig
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.engine.handle import Handle
from trm.model import TRMForCausalLM

CONTEXT = 256  # positions that a row has cached when the rounds begin
MAX_ROUNDS = 16  # timed at a time
ENOUGH_S = 1.0  # of rounds timed at a time
READ_BYTES = 2**28
MATRIX_ROWS = 512
BEST_OF = 5
SAMPLING, HEAD = "trm: sampling", "trm: head"  # labels in a profile
ATTENTION = re.compile("attention|flash|fmha|softmax|bmm")
LINEAR = re.compile("mm|linear|gemm|mkldnn|onednn|cutlass|matmul")
Raw = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What has to be read from memory, and computed: a multiplication and an addition are two operations."""

    bytes: float
    operations: float

    def floor_s(self, machine: "Machine") -> float:
        """No machine of this kind does it faster."""
        return max(self.bytes / machine.bytes_per_s, self.operations / machine.operations_per_s)


@dataclass(frozen=True)
class Machine:
    """What was measured on as many threads as decode: reading a large array, and the block's own linear products."""

    bytes_per_s: float
    operations_per_s: float


def work(
    config: TRMConfig, rows: int, context: int, effort: int, weight_bytes: float, state_bytes: float
) -> dict[str, Work]:
    """One round, part by part. Bytes of one number: of the backbone's weights, of the block's and the cache's.

    Weights are read once in every call, keys and values by every row in every call.
    """
    backbone, hidden, head_size = config.backbone_config, config.hidden_size, config.head_dim
    query, key = backbone.num_attention_heads * head_size, backbone.num_key_value_heads * head_size

    def part(calls: int, weights: int, layers: int = 0, weight_bytes: float = weight_bytes) -> Work:
        """So many calls of so many weights, with so many attending layers in a call."""
        return Work(
            calls * (weights * weight_bytes + layers * 2 * key * context * rows * state_bytes),
            calls * rows * (2 * weights + layers * 4 * query * context),
        )

    attention, keys_values = 2 * hidden * query, 2 * hidden * key
    of_backbone = attention + keys_values + 3 * hidden * backbone.intermediate_size
    of_block = attention + 3 * hidden * config.intermediate_size
    of_block += keys_values * (config.kv_source == "state")
    layers = backbone.num_hidden_layers
    return {
        "backbone": part(1, layers * of_backbone, layers),
        "recursion": part(effort * config.calls_per_step, config.n_layers * of_block, config.n_layers, state_bytes),
        "head": part(1, hidden * config.vocab_size),
    }


def measure(model: TRMForCausalLM, chat: ChatFormat, max_rows: int, quantize: str | None, repeats: int) -> Raw:
    """One row and `max_rows`, at effort 0 and at the trained one: times of a round, its floor, and what it consists of.

    Nobody drafts.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports its starts and stops
    weight = model.decoder.halt_head.weight
    machine = Machine(read_rate(weight.device), matrix_rate(model))
    context = min(CONTEXT, model.config.max_position_embeddings // 2)
    weight_bytes = 1 if quantize else weight.element_size()
    lines = []
    for rows in sorted({1, max_rows}):
        for effort in (0, model.config.n_supervision):
            parts = work(model.config, rows, context, effort, weight_bytes, weight.element_size())
            floor = sum(part.floor_s(machine) for part in parts.values())
            timed = time_rounds(model, chat, rows, context, effort, repeats)
            lines.append(
                {
                    "rows": rows,
                    "effort": effort,
                    **timed,
                    "work": {name: asdict(part) for name, part in parts.items()},
                    "floor_s": floor,
                    "share": floor / timed["round_s"],
                }
            )
    return {"context": context, **asdict(machine), "lines": lines}


def read_rate(device: torch.device) -> float:
    """Bytes per second of a sum over an array that no cache holds."""
    array = torch.ones(READ_BYTES // 4, device=device)
    return READ_BYTES / _best(lambda: float(array.sum()))


@torch.inference_mode()
def matrix_rate(model: TRMForCausalLM) -> float:
    """Operations per second of the block's own linear products over many positions."""
    block, hidden = model.decoder.layers[0].feed_forward, model.config.hidden_size
    weight = model.decoder.halt_head.weight
    h = torch.randn(MATRIX_ROWS, hidden, device=weight.device, dtype=weight.dtype)
    wide = block.up_proj(h)
    seconds = _best(lambda: (block.gate_proj(h), block.up_proj(h), float(block.down_proj(wide)[0, 0])))
    return float(MATRIX_ROWS * 6 * hidden * wide.shape[-1] / seconds)


def time_rounds(model: TRMForCausalLM, chat: ChatFormat, rows: int, context: int, effort: int, repeats: int) -> Raw:
    """Seconds of a prompt, which all rows share, and of a round, and what a round consists of."""
    tokens = 2 + (repeats + 1) * MAX_ROUNDS
    params = SamplingParams(max_tokens=tokens + 1, n_supervision=effort, ignore_eos=True)
    prompt = tuple(1 + index % 97 for index in range(context))
    engine = Engine(model, chat, EngineConfig(rows, context + tokens + 1, max_draft_tokens=0))
    handles = engine.submit([Request(prompt, params)] * rows, lambda index, event: None)
    first_s = _advance(engine, handles, 1)
    _advance(engine, handles, 1)
    rounds = max(1, min(MAX_ROUNDS, int(ENOUGH_S / _advance(engine, handles, 1))))
    with _sampling(engine) as sampling:
        seconds = [_advance(engine, handles, rounds) / rounds for _ in range(repeats)]
        sampling_s = sampling() / (repeats * rounds)
        devices = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (engine.loop.runner.device.type == "cuda")]
        with profile(activities=devices) as profiled:
            _advance(engine, handles, rounds)
    for handle in handles:
        handle.cancel()
    engine.step()
    kinds = {kind: spent / rounds for kind, spent in _kinds(profiled, engine.loop.runner.device).items()}
    kinds["sampling"] = sampling_s
    round_s = median(seconds)
    kinds["Python"] = max(0.0, round_s - sum(kinds.values()))
    return {"prompt_s": first_s, "round_s": round_s, "seconds": seconds, "spent_s": kinds}


def _advance(engine: Engine, handles: list[Handle], tokens: int) -> float:
    """Decode so many tokens more for every row; returns the seconds."""
    wanted = min(len(handle.row.reply) for handle in handles) + tokens
    started = time.perf_counter()
    while min(len(handle.row.reply) for handle in handles) < wanted:
        engine.step()
    return time.perf_counter() - started


@contextmanager
def _sampling(engine: Engine) -> Iterator[Callable[[], float]]:
    """Labels for profiles, and the seconds since the beginning that went into choosing tokens from logits."""
    spent = {SAMPLING: 0.0, HEAD: 0.0}

    def labelled(label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(label):
                started = time.perf_counter()
                result = call(*args, **kwargs)
                spent[label] += time.perf_counter() - started
                return result

        return run

    owners = ((engine.loop, "_answer", SAMPLING), (engine.loop.runner, "logits", HEAD))
    for owner, name, label in owners:
        setattr(owner, name, labelled(label, getattr(owner, name)))
    try:
        yield lambda: spent[SAMPLING] - spent[HEAD]
    finally:
        for owner, name, _ in owners:
            delattr(owner, name)


def _kinds(profiled: profile, device: torch.device) -> dict[str, float]:
    """Seconds in linear products, attention and all other operations but those of sampling.

    On cuda the device's own, among them sampling's, which a kernel does not tell.
    """
    kinds = {"linear": 0.0, "attention": 0.0, "other operations": 0.0}
    for event in profiled.events() or ():
        if device.type == "cuda":
            counts, spent = event.device_type.name == "CUDA", event.time_range.elapsed_us()
        else:
            counts, spent = "::" in event.name and not _in_sampling(event), event.self_cpu_time_total
        if counts:
            name = event.name.lower()
            kind = "attention" if ATTENTION.search(name) else "linear" if LINEAR.search(name) else "other operations"
            kinds[kind] += spent / 1e6
    return kinds


def _in_sampling(event: Any) -> bool:
    """Whether the innermost label around an operation is that of sampling."""
    while event is not None:
        if event.name in (SAMPLING, HEAD):
            return bool(event.name == SAMPLING)
        event = event.cpu_parent
    return False


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(BEST_OF):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def table(found: Raw) -> str:
    """The result for people."""
    kinds = list(found["lines"][0]["spent_s"])
    lines = [
        f"A round at {found['context']} cached positions, on a machine that reads {found['bytes_per_s'] / 1e9:.1f} "
        f"GB/s and multiplies {found['operations_per_s'] / 1e9:.0f} GFLOP/s:",
        "",
        "| rows, effort | ms | to read, GB | to compute, GFLOP | floor, ms | share of the floor | "
        + " | ".join(f"{kind}, ms" for kind in kinds)
        + " |",
        "|---|" + "---|" * (5 + len(kinds)),
    ]
    for line in found["lines"]:
        parts = line["work"].values()
        lines.append(
            f"| {line['rows']}, {line['effort']} | {1e3 * line['round_s']:.1f} "
            f"| {sum(part['bytes'] for part in parts) / 1e9:.3f} "
            f"| {sum(part['operations'] for part in parts) / 1e9:.2f} "
            f"| {1e3 * line['floor_s']:.1f} | {line['share']:.2f} | "
            + " | ".join(f"{1e3 * line['spent_s'][kind]:.1f}" for kind in kinds)
            + " |"
        )
    return "\n".join(lines)
