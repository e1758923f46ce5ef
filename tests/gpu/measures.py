"""What all measurements of a GPU share: where they run, clocks, the card's own rates, random models, targets.

Milliseconds are medians of calls that were waited for. Without a GPU everything runs at tiny sizes on the CPU, so that
mistakes are found: those numbers mean nothing.
"""

import gc
import time
import traceback
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import Qwen2Config

from trm import TRMForCausalLM, bundled_model_path
from trm.backbone import Backbone
from trm.bench.roofline import Machine
from trm.bench.settings import SHAPES
from trm.chat import ChatFormat
from trm.checkpoint import read_tokenizer

Raw = dict[str, Any]
Put = Callable[[str, Any], None]
"""Note a number of this section under a name; it is in the file at once."""

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
DEPTHS: dict[str, Raw] = {
    "qwen2.5-0.5b": {"n_latent": 2, "n_cycles": 1, "n_supervision": 4},  # 12 calls of the block a token
    "qwen2.5-1.5b": {"n_latent": 6, "n_cycles": 3, "n_supervision": 16}  # 336
    if ON_GPU
    else {"n_latent": 2, "n_cycles": 2, "n_supervision": 3},
}
"""The two shapes of the targets. A CPU has no time for the deep one."""
ROWS = (1, 8, 32, 128) if ON_GPU else (1, 2, 3)
SPREAD = 10.0  # standard deviation of the logits: a few tokens share the probability, as in a trained model
REPEATS = 9
ENOUGH_S = 1.0  # of one kind of call
COPY_BYTES = 2**30 if ON_GPU else 2**22
MATRIX_SIDE = 8192 if ON_GPU else 128
LAUNCHES = 1000
LAST_LINES = 12  # of a traceback


def sizes_of(shape: str) -> Raw:
    """The backbone of a shape; on a CPU one tiny one stands for all."""
    return SHAPES[shape] if ON_GPU else TINY


def random_model(shape: str) -> TRMForCausalLM:
    """Random weights in bfloat16, whose steps move the answer and whose logits are as peaked as `SPREAD` says."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        backbone = Backbone(Qwen2Config(**sizes_of(shape))).to(torch.bfloat16)
        model: TRMForCausalLM = TRMForCausalLM.from_backbone(backbone, **DEPTHS[shape]).to(torch.bfloat16).eval()
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.attention.o_proj.weight.normal_(std=0.02)
            layer.feed_forward.down_proj.weight.normal_(std=0.02)
        # normed states have length sqrt(D) times this weight
        model.backbone.norm.weight.fill_(SPREAD / (float(model.head.weight.std()) * model.config.hidden_size**0.5))
    return model


def let_backbone_decide(model: TRMForCausalLM) -> None:
    """Let a random model's steps say what its backbone says: then every draft is right. Packed layers stay."""
    with torch.no_grad():
        for layer in model.decoder.layers:
            for part in (layer.attention.o_proj, layer.feed_forward.down_proj):
                if hasattr(part, "weight"):
                    part.weight.zero_()


def bundled_chat() -> ChatFormat:
    """The prompts of the bundled model, for models without a tokenizer of their own."""
    return ChatFormat(read_tokenizer(bundled_model_path()))


def card(put: Put) -> Machine:
    """The control that shares are quoted against: a large copy and a large product; and what one launch costs."""
    copied, multiplied = copy_rate(), matrix_rate()
    put("bytes_per_s", copied)
    put("operations_per_s", multiplied)
    put("gb_per_s", copied / 1e9)
    put("bf16_tflop_per_s", multiplied / 1e12)
    number = torch.zeros(1, device=DEVICE)
    put("launch_us", 1e3 / LAUNCHES * timed(lambda: [number.add_(1) for _ in range(LAUNCHES)]))
    if ON_GPU:
        replay = captured(lambda: number.add_(1))
        put("replay_us", 1e3 / LAUNCHES * timed(lambda: [replay() for _ in range(LAUNCHES)]))
        put("memory_gb", torch.cuda.get_device_properties(DEVICE).total_memory / 1e9)
    return Machine(copied, multiplied)


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2e3 * COPY_BYTES / timed(lambda: target.copy_(source))


def matrix_rate() -> float:
    """Operations a second of a large square product in bfloat16."""
    left, right = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=DEVICE).bfloat16()
    out = torch.empty_like(left)
    return 2e3 * MATRIX_SIDE**3 / timed(lambda: torch.mm(left, right, out=out))


def machine_of(report: Raw) -> Machine:
    """What the section `card` found, or what is found now."""
    found = report.get("card", {})
    if "operations_per_s" in found:
        return Machine(found["bytes_per_s"], found["operations_per_s"])
    return card(lambda name, value: None)


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of a call, after two that warm up. A slow call is timed fewer times."""
    seconds: list[float] = []
    for repeat in range(REPEATS + 2):
        wait()
        started = time.perf_counter()
        call()
        wait()
        if repeat >= 2:
            seconds.append(time.perf_counter() - started)
        if sum(seconds) > ENOUGH_S:
            break
    return 1e3 * median(seconds)


def wait() -> None:
    """Until the device has done what it was asked for."""
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as one CUDA graph, after three calls that prepare it. On a CPU the call itself."""
    if not ON_GPU:
        return call
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(DEVICE).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def attempt(put: Put, name: str, call: Callable[[], Any]) -> Any:
    """Note what a call returns, or why it failed: what follows is measured all the same. None where it failed."""
    try:
        found = call()
    except Exception:  # noqa: BLE001 - whatever it was, the rest is measured
        put(name, {"failed": traceback.format_exc().splitlines()[-LAST_LINES:]})
        return None
    put(name, found)
    return found


def at_most(what: str, limit: float, measured: float | None) -> Raw:
    """A target beside what was measured, None where it was not."""
    met = None if measured is None else measured <= limit
    return {"target": f"{what} <= {limit:g}", "measured": measured, "met": met}


def at_least(what: str, limit: float, measured: float | None) -> Raw:
    """See `at_most`."""
    met = None if measured is None else measured >= limit
    return {"target": f"{what} >= {limit:g}", "measured": measured, "met": met}


def empty_cache() -> None:
    """Give back what a model that is gone has left, its graphs included, and count the peak of memory anew."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
