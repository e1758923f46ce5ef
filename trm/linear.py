"""Linear layers packed once for decoding: products in bfloat16 and in int8 on a CPU, in float8 on a GPU.

A row's product is the same to the bit however many rows there are. oneDNN's packed products have this property from
some number of rows on, which depends on shape and processor: it sums in blocks that few rows make it cut otherwise. So
each shape is measured once, and calls of fewer rows are filled up. The operators are torch's own internals, named
nowhere else; where they are missing or wrong, there are plain layers in their place, and no int8. The float8 layers
have not run on a GPU yet.

Legend: N rows, I inputs, O outputs of a layer.
"""

import logging
import time
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trm.errors import ConfigError
from trm.layers import Linear

logger = logging.getLogger(__name__)

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64)  # calls whose bits are compared
MANY_ROWS = (96, 128, 251, 300, 512)  # and larger ones, which must all agree
FASTER_ROWS = 4  # which one, two or three rows are no faster than: 26 ms a token for four, 33 for one (0.5B, AVX512)
CHECKED_OUTPUTS = 4096  # of a large layer: its products are cut alike all along
ZERO_POINT = 128  # activations are unsigned: for signed ones oneDNN has no fast product on some processors
TINY = 1e-30  # nothing is divided by less
FP8 = torch.float8_e4m3fn
FP8_LARGEST = torch.finfo(FP8).max
FP8_MULTIPLE = 16  # of which a layer's sizes must be multiples
SLOW = 20  # times the seconds of the float32 product: oneDNN's reference code takes a thousand


class PackedLinear(nn.Module):
    """A linear layer in bfloat16, from its weight (O, I)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        least = least_rows(*weight.shape, torch.get_num_threads())
        self.exact = least is not None
        self.least_rows = max(FASTER_ROWS, least or 1)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = None if bias is None else bias.clone()

    def forward(self, h: Tensor) -> Tensor:
        """The product (…, O) of h (…, I), in bfloat16."""
        rows = _filled(h.to(torch.bfloat16).flatten(0, -2), self.least_rows)
        out = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self._bias, "none", [], "")
        return out[: h[..., 0].numel()].unflatten(0, h.shape[:-1])  # type: ignore[no-any-return]


class Int8Linear(nn.Module):
    """A linear layer whose weight (O, I) is int8, scaled by outputs, and whose inputs are scaled row by row.

    A scale for a whole batch would let a row's neighbours change its tokens.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        scale = weight.abs().amax(1).float().clamp_(min=TINY) / 127
        parts = zip(weight.split(CHECKED_OUTPUTS), scale.split(CHECKED_OUTPUTS), strict=True)
        whole = torch.cat([(part / scales[:, None]).round_().to(torch.int8) for part, scales in parts])
        self._packed = torch.ops.onednn.qlinear_prepack(whole, None)
        self._scale = scale
        self._zero_points = torch.zeros(len(scale), dtype=torch.int64)
        self._bias = None if bias is None else bias.float()

    def forward(self, h: Tensor) -> Tensor:
        """The product (…, O) of h (…, I)."""
        rows = h.flatten(0, -2).float()
        largest = rows.abs().amax(-1, keepdim=True).clamp_(min=TINY)  # (N, 1); the infinity norm is 13 times slower
        whole = (rows * (127 / largest)).add_(ZERO_POINT + 0.5).to(torch.uint8)  # cut off, so rounded
        out = _int8_product(whole, self._packed, self._scale, self._zero_points).mul_(largest / 127)
        if self._bias is not None:
            out += self._bias
        return out.to(self.dtype).unflatten(0, h.shape[:-1])  # type: ignore[no-any-return]


class Fp8Linear(nn.Module):
    """A linear layer whose weight (O, I) is float8, scaled by outputs, and whose inputs are scaled row by row."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        parts = []
        scale = weight.abs().amax(1).float().clamp_(min=TINY) / FP8_LARGEST
        for part, scales in zip(weight.split(CHECKED_OUTPUTS), scale.split(CHECKED_OUTPUTS), strict=True):
            parts.append((part / scales[:, None]).to(FP8))
        self._weight = torch.cat(parts).t()  # (I, O), its columns one behind the other, as the product wants them
        self._scale = scale[None]
        self._bias = None if bias is None else bias.clone()

    def forward(self, h: Tensor) -> Tensor:
        """The product (…, O) of h (…, I), in bfloat16."""
        rows = h.flatten(0, -2).float()
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=TINY) / FP8_LARGEST  # (N, 1)
        out = _fp8_product((rows / scale).to(FP8), self._weight, scale, self._scale)
        if self._bias is not None:
            out = out + self._bias
        return out.unflatten(0, h.shape[:-1])  # type: ignore[no-any-return]


def pack_fp8(backbone: nn.Module) -> None:
    """Replace the linear layers of a bfloat16 backbone on a GPU by float8 ones, where their sizes allow it.

    Raises ConfigError where the device has no such products.
    """
    device = next(backbone.parameters()).device
    if not has_fp8(device):
        raise ConfigError(
            f"--quantize fp8: {device} has no float8 products; they need a GPU of Hopper's kind or later (compute "
            "capability 9.0); leave it out"
        )
    for module in list(backbone.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Linear) and not any(size % FP8_MULTIPLE for size in layer.weight.shape):
                setattr(module, name, Fp8Linear(layer.weight, layer.bias))


def has_fp8(device: torch.device) -> bool:
    """Whether a device has fast float8 products with a scale for each row."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def pack(model: nn.Module, int8: nn.Module | None = None) -> bool:
    """Replace all linear layers of a bfloat16 model, one at a time; those inside `int8` by int8 ones.

    Returns whether products are the same to the bit in any company. Raises ConfigError where int8 is asked for
    and the processor has no fast products of it.
    """
    if int8 is not None and not (has_int8() and has_packed_bfloat16()):
        raise ConfigError("--quantize int8: this processor has no fast int8 products; leave it out")
    if not has_packed_bfloat16():
        logger.warning("torch has no packed bfloat16 products here: decoding is slower, and not the same to the bit")
        return False
    quantized = set() if int8 is None else {id(part) for part in int8.modules()}
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if not isinstance(layer, Linear):
                continue
            bias = layer.bias
            if id(layer) in quantized:
                whole: nn.Module = Int8Linear(
                    layer.weight, bias, torch.float32 if name == "lm_head" else torch.bfloat16
                )
            else:
                whole = PackedLinear(layer.weight, bias)
            setattr(module, name, whole)
    return all(layer.exact for layer in model.modules() if isinstance(layer, PackedLinear))


@cache
def has_packed_bfloat16() -> bool:
    """Whether torch has the operators, and they compute what they should."""
    weight, rows = torch.eye(64, dtype=torch.bfloat16), _telling(1, 64, 3)[1]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return bool(torch.equal(torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], ""), rows))
    except (RuntimeError, AttributeError):
        return False


@cache
def has_int8() -> bool:
    """Whether torch has fast int8 products here, and they compute what they should."""
    inputs, outputs = 512, 512
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    rows = torch.randint(0, 256, (8, inputs), dtype=torch.uint8, generator=generator)
    expected = (rows.double() - ZERO_POINT) @ weight.double().T
    scale, zero_points = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        found = _int8_product(rows, packed, scale, zero_points)
    except (RuntimeError, AttributeError):
        return False
    wide, wide_weight = rows.float(), weight.float()
    seconds = _seconds(lambda: _int8_product(rows, packed, scale, zero_points))
    return torch.equal(found.double(), expected) and seconds < SLOW * _seconds(lambda: F.linear(wide, wide_weight))


@cache
def least_rows(outputs: int, inputs: int, num_threads: int) -> int | None:
    """From how many rows on a packed product gives each row the same bits; None where it does not."""
    weight, rows = _telling(min(outputs, CHECKED_OUTPUTS), inputs, MANY_ROWS[-1])
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    whole = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    least = None
    for count in reversed((*ROWS, *MANY_ROWS)):
        some = torch.ops.mkldnn._linear_pointwise(rows[:count], packed, None, "none", [], "")
        if not torch.equal(some, whole[:count]):
            break
        least = count
    return least if least in ROWS else None


def _telling(outputs: int, inputs: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """A weight (O, I) and rows (N, I) whose products are nothing but rounding: any other order of sums shows."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(inputs, generator=generator)
    half = torch.randn(outputs, (inputs + 1) // 2, generator=generator)
    weight = torch.cat((half, -half), dim=1)[:, order]
    half = torch.randn(num_rows, (inputs + 1) // 2, generator=generator)
    return weight.bfloat16(), torch.cat((half, half), dim=1)[:, order].bfloat16()


def _filled(rows: Tensor, least: int) -> Tensor:
    """At least so many rows; what the further ones hold is nobody's business."""
    if len(rows) == 1:
        return rows.expand(least, -1)
    return F.pad(rows, (0, 0, 0, least - len(rows))) if len(rows) < least else rows


def _int8_product(rows: Tensor, packed: Tensor, scale: Tensor, zero_points: Tensor) -> Tensor:
    """Unsigned rows (N, I), less ZERO_POINT, times a packed weight, scaled by outputs: (N, O) in float32."""
    return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
        rows, 1.0, ZERO_POINT, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _fp8_product(rows: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Rows (N, I) times a weight (I, O), both float8, scaled by rows (N, 1) and outputs (1, O): in bfloat16."""
    return torch._scaled_mm(rows, weight, scale_a=scale, scale_b=weight_scale, out_dtype=torch.bfloat16)


def _seconds(call: object) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        call()  # type: ignore[operator]
        best = min(best, time.perf_counter() - started)
    return best
