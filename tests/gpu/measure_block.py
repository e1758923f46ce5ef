"""One supervision step of the block: launched kernel by kernel, captured, compiled, and compiled and captured.

It says what a compiler or a kernel of our own could still gain over capturing. Keys and values are there already.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.gpu.measures import (
    DEPTHS,
    DEVICE,
    ON_GPU,
    Put,
    Raw,
    attempt,
    captured,
    empty_cache,
    machine_of,
    random_model,
    timed,
)
from trm import TRMForCausalLM
from trm.bench.roofline import Machine, work
from trm.layers import attend

ROWS = (1, 32, 128) if ON_GPU else (1, 3)
CONTEXT = 384 if ON_GPU else 24
COMPILE = {"dynamic": False, "fullgraph": True}


class Context:
    """The `KeyValues` of rows of one position each, over keys and values (B, K, S, d) that stay as they are."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self._mask = torch.zeros(len(keys), 1, 1, keys.shape[2], dtype=keys.dtype, device=keys.device)

    def write(self, entry: int, keys: Tensor, values: Tensor) -> None:
        """Keys come from the context."""
        raise NotImplementedError

    def attend(self, entry: int, queries: Tensor) -> Tensor:
        """What queries (B, H, d) read: (B, H, d)."""
        asked = queries.to(self._keys.dtype).unsqueeze(2)
        return attend(asked, self._keys, self._values, self._mask).squeeze(2)


def block(put: Put, report: Raw) -> None:
    """Both shapes. What needs no compiler comes first; a compiler that is missing stops nothing."""
    machine = machine_of(report)
    for shape in DEPTHS:
        model = random_model(shape)
        for rows in ROWS:
            attempt(put, f"{shape}, {rows} rows", partial(plain, model, rows, machine))
        del model
        empty_cache()
    for shape in DEPTHS:
        torch.compiler.reset()
        model = random_model(shape)
        model.decoder.layers[0].compile(**COMPILE)
        for rows in ROWS:
            attempt(put, f"{shape}, {rows} rows, compiled", partial(compiled, model, rows))
        del model
        empty_cache()


@torch.no_grad()
def plain(model: TRMForCausalLM, rows: int, machine: Machine) -> Raw:
    """Milliseconds of a step kernel by kernel and captured, and the time that reading or computing alone would take."""
    step, _ = step_of(model, rows)
    found = {"kernel_by_kernel_ms": timed(step), "captured_ms": timed(captured(step))}
    size = model.decoder.dtype.itemsize
    bound = work(model.config, rows, CONTEXT, 1, size, size)["recursion"].floor_s(machine)
    return found | {"bound_ms": 1e3 * bound, "share_of_bound": 1e3 * bound / found["captured_ms"]}


@torch.no_grad()
def compiled(model: TRMForCausalLM, rows: int) -> Raw:
    """The same with compiled layers; the first call compiles. How far answers are from those of plain layers."""
    step, answer = step_of(model, rows)
    began = time.perf_counter()
    step()
    found: Raw = {"compile_s": time.perf_counter() - began}
    with torch.compiler.set_stance("force_eager"):
        other_step, other = step_of(model, rows)
        other_step()
    found["largest_difference"] = float((answer - other).abs().max())
    return found | {"compiled_ms": timed(step), "compiled_captured_ms": timed(captured(step))}


def step_of(model: TRMForCausalLM, rows: int) -> tuple[Callable[[], None], Tensor]:
    """A supervision step that goes on from its own answer, and where that lies, (B, D)."""
    config, backbone = model.config, model.config.backbone_config
    drawn = torch.Generator(DEVICE).manual_seed(rows)

    def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*sizes, generator=drawn, device=DEVICE).to(dtype)

    sizes = rows, backbone.num_key_value_heads, CONTEXT, config.head_dim
    context = Context(*(normal(*sizes, dtype=model.decoder.dtype) for _ in range(2)))
    x, y, z = (normal(rows, config.hidden_size) for _ in range(3))
    rope = model.backbone.rope(torch.full((rows,), CONTEXT, device=DEVICE))

    def step() -> None:
        answer, latent = model.decoder.step(x, y, z, rope, context)
        y.copy_(answer)
        z.copy_(latent)

    return step, y
