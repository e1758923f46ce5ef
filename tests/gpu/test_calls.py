"""The calls that a GPU replays: their numbers, what they wait for, and which kernels they find."""

import gc
import weakref

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conftest import make_model
from tests.gpu.devices import DEVICE, on_device, on_gpu
from tests.trm.test_static import decode, prompts, runners
from trm.engine.runner import Chunk, Halting
from trm.engine.slots import Span
from trm.layers import attend
from trm.linear import Fp8Linear, has_fp8

TOLERANCE = 1e-3  # of logits in float32: sums in other orders, through a few steps that contract


@on_device
@pytest.mark.parametrize("num_rows", range(1, 8))
def test_replayed_calls_say_what_plain_calls_on_the_cpu_say(kv_source, num_rows):
    cpu, _ = runners(make_model(kv_source=kv_source))
    plain, static = runners(make_model(kv_source=kv_source).to(DEVICE))
    rows, rules = prompts(num_rows), None
    if kv_source == "context":
        rules = [Halting(0.999, 1e-9)] * num_rows  # asked, and never met

    want = decode(cpu, rows, rules)
    for runner in (plain, static, static):  # the second time everything is there
        for one, other in zip(want, decode(runner, rows, rules), strict=True):
            assert torch.allclose(other.cpu(), one, atol=TOLERANCE), float((other.cpu() - one).abs().max())


@on_gpu
def test_nothing_waits_for_the_device(kv_source):
    """Prompts, tokens and ticks, halting or not, are only launched. What is asked for is read when it is wanted."""
    _, static = runners(make_model(kv_source=kv_source).to("cuda"))
    rows = prompts(5)
    ends = [len(row.tokens) for row in rows]
    rules = [Halting(0.5, 0.1)] * len(rows) if kv_source == "context" else None

    def turn() -> None:
        static.encode(rows)
        static.encode([Chunk(row.slot, end, [7], place=0) for row, end in zip(rows, ends, strict=True)])
        for step in range(2):
            static.tick([Span(row.slot, end) for row, end in zip(rows, ends, strict=True)], [step] * len(rows), rules)
        static.logits([row.slot for row in rows])

    turn()
    torch.cuda.set_sync_debug_mode("error")
    try:
        turn()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_device
def test_a_decoder_that_is_gone_keeps_no_graph():
    model = make_model().to(DEVICE)
    _, static = runners(make_model().to(DEVICE))
    static.seat(0, model)
    static.encode([Chunk(0, 0, [5], place=0)])
    static.tick([Span(0, 0)], [0])
    static.leave(0)
    gone = weakref.ref(model)
    assert model in static.graphs._of

    del model
    gc.collect()

    assert gone() is None
    assert len(static.graphs._of) == 1


@on_gpu
@pytest.mark.parametrize("queries", [1, 5, 70])
@pytest.mark.parametrize("width", [64, 70])
@pytest.mark.parametrize("heads", [(14, 2, 64), (12, 2, 128)], ids=["0.5b", "1.5b"])
def test_attention_with_grouped_heads_and_a_mask_finds_a_fast_kernel(queries, width, heads):
    num_heads, num_key_heads, size = heads
    drawn = {"device": "cuda", "dtype": torch.bfloat16}
    asked = torch.randn(4, num_heads, queries, size, **drawn)
    keys, values = torch.randn(2, 4, num_key_heads, width, size, **drawn)
    mask = torch.zeros(4, 1, queries, width, **drawn)
    mask[..., width // 2 :] = -torch.inf

    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):  # an error where it cannot
        found = attend(asked, keys, values, mask)

    want = attend(asked.cpu().float(), keys.cpu().float(), values.cpu().float(), mask.cpu().float())
    assert torch.allclose(found.cpu().float(), want, atol=0.02)


@on_gpu
def test_float8_products_are_near():
    if not has_fp8(torch.device("cuda")):
        pytest.skip("this GPU has no float8 products")
    torch.manual_seed(0)
    for rows, outputs, inputs in ((1, 1152, 896), (32, 896, 4864), (128, 9728, 896)):
        weight, h = torch.randn(outputs, inputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
        layer = Fp8Linear(weight.cuda(), torch.ones(outputs).bfloat16().cuda())

        found = layer(h.cuda()).cpu().float()

        want = h.float() @ weight.float().T + 1
        assert ((found - want).square().mean().sqrt() / want.std()) < 0.06
        assert torch.equal(layer(h[:1].cuda()).cpu().float().isfinite(), torch.ones(1, outputs, dtype=torch.bool))


@on_gpu
def test_a_capture_that_fails_leaves_the_device_well():
    """What cannot be captured runs kernel by kernel; others are captured, and random numbers are drawn, as before."""
    _, static = runners(make_model().to("cuda"))
    graphs, here = static.graphs, torch.cuda.current_stream()
    static.encode([Chunk(0, 0, [5], place=0)])
    before = static.logits([0]).clone()

    def broken(table: torch.Tensor) -> torch.Tensor:
        return table * table.sum().item()

    for number in (2, 3):
        numbers = torch.full((5, 1), number)
        found = graphs.run(static.model, "broken", broken, numbers, lambda: torch.zeros(5, 1, dtype=torch.int64))
        assert found.tolist() == [[5 * number * number]] * 5

    assert graphs.plain == 1
    assert torch.cuda.current_stream() == here
    assert torch.randn(3, device="cuda").isfinite().all()
    static.probe()
    assert torch.equal(static.logits([0]), before), "what was captured before"
    static.encode([Chunk(slot, 0, [5], place=0) for slot in range(3)])
    assert torch.allclose(static.logits([0, 1, 2]), before, atol=TOLERANCE)
    assert graphs.plain == 1 < graphs.count
