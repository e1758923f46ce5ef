"""Packed products: their numbers, their bits, and what happens where a processor lacks them."""

import logging

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import make_model
from trm import linear
from trm.device import has_fast_bfloat16
from trm.errors import ConfigError
from trm.layers import Linear
from trm.linear import Fp8Linear, Int8Linear, PackedLinear, has_int8, has_packed_bfloat16, least_rows, pack, pack_fp8

needs_bfloat16 = pytest.mark.skipif(
    not (has_fast_bfloat16("cpu") and has_packed_bfloat16()), reason="this processor has no bfloat16 products"
)
needs_int8 = pytest.mark.skipif(not has_int8(), reason="this processor has no fast int8 products")
SHAPES = [(64, 64), (96, 200), (320, 1536), (5, 3), (896, 4864)]


def some_weight(outputs: int, inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(outputs)
    return (torch.randn(outputs, inputs, generator=generator) / inputs**0.5).bfloat16()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@needs_bfloat16
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_product_is_the_product(shape, bias):
    weight, offset = some_weight(*shape), torch.randn(shape[0]).bfloat16() if bias else None
    h = torch.randn(3, 4, shape[1])

    found = PackedLinear(weight, offset)(h)

    expected = F.linear(h.bfloat16().double(), weight.double(), None if offset is None else offset.double())
    assert found.shape == (3, 4, shape[0])
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < 0.003, "no more than its own rounding"


@needs_int8
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] >= 64])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_product_is_near(shape, bias):
    weight, offset = some_weight(*shape), torch.randn(shape[0]).bfloat16() if bias else None
    h = torch.randn(6, shape[1])
    h[3] *= 1000  # a loud neighbour

    found = Int8Linear(weight, offset, torch.float32)(h)

    expected = F.linear(h.double(), weight.double(), None if offset is None else offset.double())
    assert all(error(found[row], expected[row]) < 0.02 for row in range(6)), "each row by its own scale"


@needs_int8
def test_int8_of_nothing_is_nothing():
    layer = Int8Linear(torch.zeros(8, 64).bfloat16(), None, torch.float32)

    assert not layer(torch.zeros(2, 64)).any()
    assert not layer(torch.randn(2, 64)).any()


@needs_bfloat16
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["bfloat16", pytest.param("int8", marks=needs_int8)])
def test_rows_have_the_same_bits_alone_and_in_any_batch(shape, kind):
    """Products that are nothing but rounding show every other order of sums."""
    weight, rows = linear._telling(*shape, 70)
    rows[::2] += 1
    layer = PackedLinear(weight, None) if kind == "bfloat16" else Int8Linear(weight, None, torch.float32)

    with torch.inference_mode():
        whole = layer(rows)
        for count in (*range(1, 20), 31, 32, 33, 64, 69):
            assert torch.equal(layer(rows[:count]), whole[:count]), count
        assert all(torch.equal(layer(rows[row : row + 1]), whole[row : row + 1]) for row in range(70))


@needs_bfloat16
def test_telling_rows_tell():
    """Their products in another order of sums are other numbers, nearly all of them."""
    weight, rows = linear._telling(64, 512, 8)
    forward = F.linear(rows.float(), weight.float())
    backward = F.linear(rows.float().flip(1), weight.float().flip(1))

    assert (forward != backward).float().mean() > 0.5


@needs_bfloat16
def test_least_rows_is_looked_at_and_filled_up_to(monkeypatch):
    """A product that sums fewer than 6 rows otherwise gets 6."""
    real = torch.ops.mkldnn._linear_pointwise
    calls = []

    class Ops:
        _reorder_linear_weight = torch.ops.mkldnn._reorder_linear_weight

        @staticmethod
        def _linear_pointwise(rows, *args):
            calls.append(len(rows))
            return real(rows, *args) + (len(rows) < 6)

    monkeypatch.setattr(torch.ops, "mkldnn", Ops)
    least_rows.cache_clear()
    layer = PackedLinear(some_weight(32, 32), None)
    least_rows.cache_clear()

    assert layer.least_rows == 6
    calls.clear()
    for count in (1, 5, 6, 7):
        assert layer(torch.randn(count, 32)).shape == (count, 32)
    assert calls == [6, 6, 6, 7]


@needs_bfloat16
def test_products_that_never_agree_are_not_called_exact(monkeypatch):
    """Each number of rows has a class of its own: nothing is filled up, and the model is not exact."""
    real = torch.ops.mkldnn._linear_pointwise

    class Ops:
        _reorder_linear_weight = torch.ops.mkldnn._reorder_linear_weight

        @staticmethod
        def _linear_pointwise(rows, *args):
            return real(rows, *args) * (1 + len(rows) / 64)

    model = make_model().to(torch.bfloat16)
    least_rows.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "mkldnn", Ops)
        assert least_rows(64, 64, 1) is None
        patch.setattr(linear, "has_packed_bfloat16", lambda: True)
        assert not pack(model)
    least_rows.cache_clear()


@needs_bfloat16
def test_pack_replaces_every_linear_layer_and_keeps_the_model_answering():
    model = make_model(own_lm_head=True).to(torch.bfloat16)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits.detach()

    with torch.inference_mode():
        exact = pack(model)
        after = model(ids).logits

    assert exact
    assert not any(isinstance(module, Linear) for module in model.modules())
    assert error(after, before.double()) < 0.02


def emulated(rows: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor) -> Tensor:
    """What a GPU multiplies: exact products of float8, added up in float32."""
    assert rows.dtype == weight.dtype == torch.float8_e4m3fn
    assert rows.is_contiguous()
    assert weight.t().is_contiguous()
    return ((rows.float() @ weight.float()) * scale * weight_scale).bfloat16()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48, 64), (4112, 32)])
def test_float8_product_is_near(shape, bias, monkeypatch):
    monkeypatch.setattr(linear, "_fp8_product", emulated)
    torch.manual_seed(0)
    outputs, inputs = shape
    weight = torch.randn(outputs, inputs) * torch.logspace(-3, 1, outputs)[:, None]  # each output has its own size
    added = torch.randn(outputs).bfloat16() if bias else None
    rows = torch.randn(3, 5, inputs) * torch.tensor([1e-4, 1.0, 300.0])[:, None, None]  # and each row

    found = Fp8Linear(weight.bfloat16(), added)(rows.bfloat16()).float()

    expected = rows @ weight.T + (0 if added is None else added.float())
    size = rows.norm(dim=-1, keepdim=True) * weight.norm(dim=-1) + (0 if added is None else added.float().abs())
    errors = (found - expected) / size
    assert errors.abs().max() < 0.05
    assert 1e-4 < errors.square().mean().sqrt() < 0.01, "near, and not the plain product"
    assert found.shape == expected.shape


def test_float8_of_nothing_is_nothing_and_of_no_number_is_none(monkeypatch):
    monkeypatch.setattr(linear, "_fp8_product", emulated)
    layer = Fp8Linear(torch.eye(16).bfloat16(), None)

    found = layer(torch.tensor([[0.0] * 16, [float("nan")] * 16, [1.0] * 16]).bfloat16())

    assert torch.equal(found[[0, 2]], torch.tensor([[0.0] * 16, [1.0] * 16]).bfloat16())
    assert found[1].isnan().all()


def test_float8_is_for_the_backbone_on_a_gpu_of_its_kind(monkeypatch):
    model = make_model(sizes={"vocab_size": 404}).to(torch.bfloat16)
    with pytest.raises(ConfigError, match="--quantize fp8: cpu has no float8 products; they need a GPU"):
        pack_fp8(model.backbone)
    monkeypatch.setattr(linear, "has_fp8", lambda device: True)

    pack_fp8(model.backbone)

    assert model.backbone.is_packed
    kinds = {type(layer) for layer in model.backbone.modules() if hasattr(layer, "forward")}
    assert Fp8Linear in kinds
    assert type(model.backbone.lm_head) is Linear, "404 tokens are no multiple of 16"
    assert not any(isinstance(layer, Fp8Linear) for layer in model.decoder.modules())


@needs_int8
def test_int8_is_for_the_backbone_alone():
    model = make_model().to(torch.bfloat16)

    pack(model, model.backbone)

    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name.endswith(("proj", "head"))}
    assert {kind for name, kind in kinds.items() if name.startswith("backbone.")} == {"Int8Linear"}
    assert {kind for name, kind in kinds.items() if "proj" in name and name.startswith("decoder.")} == {"PackedLinear"}


def test_int8_where_it_is_slow_or_missing_is_refused(monkeypatch):
    monkeypatch.setattr(linear, "has_int8", lambda: False)
    model = make_model().to(torch.bfloat16)

    with pytest.raises(ConfigError, match="--quantize int8: this processor has no fast int8 products; leave it out"):
        pack(model, model.backbone)


def test_without_packed_products_plain_layers_stay(monkeypatch, caplog):
    monkeypatch.setattr(linear, "has_packed_bfloat16", lambda: False)
    model = make_model().to(torch.bfloat16)

    with caplog.at_level(logging.WARNING):
        assert not pack(model)

    assert any(isinstance(module, Linear) for module in model.modules())
    assert "not the same to the bit" in caplog.text


def test_operators_that_torch_does_not_have_are_noticed(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    monkeypatch.setattr(torch.ops, "onednn", object())

    assert not has_packed_bfloat16.__wrapped__()
    assert not has_int8.__wrapped__()


@needs_int8
def test_int8_by_reference_code_counts_as_none(monkeypatch):
    """It is right, and a thousand times slower: seen on a processor without products of signed inputs."""
    seconds = iter([1.0, 0.001])
    monkeypatch.setattr(linear, "_seconds", lambda call: next(seconds))

    assert not has_int8.__wrapped__()
