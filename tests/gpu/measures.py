"""What a GPU does with the engine: calls launched kernel by kernel and replayed, whole replies, memory, and agreement.

Each function returns numbers for the report of `tests.gpu.run`. Seconds are medians, of calls that are waited for.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config

from trm import TRMForCausalLM
from trm.backbone import Backbone
from trm.bench import roofline
from trm.chat import ChatFormat, solve_messages
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.engine.runner import Chunk, Runner
from trm.engine.sampling import Ask
from trm.engine.slots import Span
from trm.engine.static import StaticRunner, default_buckets
from trm.loading import prepare_for_decoding

Raw = dict[str, Any]
REPEATS = 9
ENOUGH_S = 2.0  # of one kind of call
GREEDY = SamplingParams(temperature=0.0)


def random_model(sizes: Raw, depth: Raw, device: str, quantize: str | None = None) -> TRMForCausalLM:
    """Random weights in bfloat16, whose steps move the answer."""
    torch.manual_seed(0)
    with torch.device(device):
        backbone = Backbone(Qwen2Config(**sizes)).to(torch.bfloat16)
        model = TRMForCausalLM.from_backbone(backbone, **depth).to(torch.bfloat16).eval()
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.attention.o_proj.weight.normal_(std=0.02)
            layer.feed_forward.down_proj.weight.normal_(std=0.02)
    return prepare_for_decoding(model, quantize)


def calls(model: TRMForCausalLM, num_rows: Sequence[int], context: int) -> list[Raw]:
    """Milliseconds of backbone, tick and choice, plain and replayed, and of the token that they make; and the floor."""
    config, steps = model.config, model.config.n_supervision
    machine = roofline.Machine(roofline.read_rate(model.device), roofline.matrix_rate(model))
    size = model.backbone.dtype.itemsize
    lines = []
    for rows in num_rows:
        sizes = model, rows, context + 1, config.cache_entries(steps)
        found: Raw = {"rows": rows, "context": context}
        for name, runner in (("plain", Runner(*sizes)), ("replayed", StaticRunner(*sizes, buckets=(rows,)))):
            runner.exact = False
            found[name] = of_token(runner, rows, context, steps)
            if isinstance(runner, StaticRunner):
                found["captured"] = runner.graphs.count
                found["capture_s"], found["capture_mb"] = runner.graphs.seconds, runner.graphs.bytes / 1e6
        parts = roofline.work(config, rows, context, steps, size, size)
        found["floor_ms"] = 1e3 * sum(part.floor_s(machine) for part in parts.values())
        found["share_of_floor"] = found["floor_ms"] / found["replayed"]["token_ms"]
        lines.append(found)
    lines.append({"read_gb_per_s": machine.bytes_per_s / 1e9, "multiply_tflop_per_s": machine.operations_per_s / 1e12})
    return lines


def of_token(runner: Runner, rows: int, context: int, steps: int) -> Raw:
    """Milliseconds of the calls for one token of each row."""
    slots, asks = range(rows), [Ask(GREEDY, context)] * rows
    chunks = [Chunk(slot, context, [7], place=0) for slot in slots]
    spans = [Span(slot, context) for slot in slots]
    drawn = [Ask(SamplingParams(temperature=0.7, top_p=0.95, seed=slot), context) for slot in slots]
    found = {
        "backbone_ms": timed(lambda: runner.encode(chunks), runner.device),
        "tick_ms": timed(lambda: runner.tick(spans, [1] * rows), runner.device),
        "greedy_ms": timed(lambda: runner.choose(slots, [0] * rows, asks), runner.device),
        "drawn_ms": timed(lambda: runner.choose(slots, [0] * rows, drawn), runner.device),
    }
    found["token_ms"] = found["backbone_ms"] + steps * found["tick_ms"] + found["greedy_ms"]
    found["tokens_per_s"] = 1e3 * rows / found["token_ms"]
    return found


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call, after two that warm up."""
    seconds: list[float] = []
    for repeat in range(REPEATS + 2):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        if repeat >= 2:
            seconds.append(time.perf_counter() - started)
        if sum(seconds) > ENOUGH_S:
            break
    return 1e3 * median(seconds)


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def replies(
    model: TRMForCausalLM,
    chat: ChatFormat,
    rows: int,
    effort: int,
    tokens: int,
    max_draft_tokens: int = 0,
    **params: Any,
) -> Raw:
    """Tokens per second of the whole engine, its device's idle share, the time to a first token, and memory."""
    started = time.perf_counter()
    sizes = {"max_rows": rows, "max_model_len": 512, "max_draft_tokens": max_draft_tokens}
    engine = Engine(model, chat, EngineConfig(**sizes, row_buckets=default_buckets(rows, max_draft_tokens)))
    engine.generate([wanted(0, 1, effort, **params)])
    first_s = time.perf_counter() - started
    requests = [wanted(row, tokens, effort, **params) for row in range(rows)]
    engine.generate(requests)  # everything is captured now
    wait(model.device)
    started = time.perf_counter()
    engine.generate(requests)
    seconds = time.perf_counter() - started
    found: Raw = {"rows": rows, "effort": effort, "drafts": max_draft_tokens, **params, "first_token_s": first_s}
    found |= {"tokens_per_s": rows * tokens / seconds, "token_ms": 1e3 * seconds / tokens}
    if model.device.type == "cuda":
        found["idle_share"] = idle_share(engine, requests)
        found["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    engine.close()
    return found


def wanted(row: int, tokens: int, effort: int, **params: Any) -> Request:
    """A prompt of 100 tokens that shares nothing with other rows' prompts, decoded past the end token."""
    prompt = tuple(5 + (row * 31 + place * 7) % 1000 for place in range(100))
    return Request(prompt, SamplingParams(max_tokens=tokens, n_supervision=effort, ignore_eos=True, **params))


def idle_share(engine: Engine, requests: Sequence[Request]) -> float:
    """Share of the time in which no kernel runs, from the first one to the last."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        engine.generate(requests)
        wait(engine.model.device)
    ranges = [event.time_range for event in profiled.events() or () if event.device_type.name == "CUDA"]
    whole = max(span.end for span in ranges) - min(span.start for span in ranges)
    return 1 - sum(span.elapsed_us() for span in ranges) / whole


@torch.inference_mode()
def agreement(model: TRMForCausalLM, short: TRMForCausalLM, chat: ChatFormat, num: int, tokens: int) -> Raw:
    """Where bfloat16 says the token that float32 says, teacher-forced on float32's greedy replies, step by step."""
    questions = [f"Tom has {n + 2} apples and buys {3 * n + 1} more. How many apples has he?" for n in range(num)]
    prompts = [tuple(chat.encode(solve_messages(question))) for question in questions]
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    engine = Engine(model, chat, EngineConfig(max_rows=min(num, 32), max_model_len=512, max_draft_tokens=0))
    said = engine.generate([Request(prompt, params) for prompt in prompts])
    steps = [step for step in (1, 4, 16) if step <= model.config.max_supervision]
    equal, apart, count = dict.fromkeys(steps, 0), dict.fromkeys(steps, 0.0), 0
    for prompt, reply in zip(prompts, said, strict=True):
        ids = torch.tensor([[*prompt, *reply.token_ids]])
        places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        both = []
        for one in (model, short):
            out = one(ids.to(one.device), n_supervision=steps[-1], return_all_steps=True, logits_to_keep=places)
            both.append(out.all_logits[[step - 1 for step in steps], 0].float().cpu())  # (steps, Q, V)
        count += len(places)
        for step, wide, narrow in zip(steps, *both, strict=True):
            equal[step] += int((wide.argmax(-1) == narrow.argmax(-1)).sum())
            apart[step] = max(apart[step], float((wide - narrow).abs().max()))
    return {
        "tokens": count,
        "agree": {step: equal[step] / count for step in steps},
        "largest_difference_of_logits": apart,
    }
