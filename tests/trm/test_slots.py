"""What attention sees of a call's positions: every one of them once, its own row and nothing beyond itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trm.engine.slots import WIDTH, Slots, SlotView, Span, locate

CPU = torch.device("cpu")
NUM_SLOTS, LENGTH, HEADS, KEY_HEADS, SIZE = 6, 3 * WIDTH, 4, 2, 8

spans = st.lists(
    st.tuples(st.integers(0, NUM_SLOTS - 1), st.integers(0, LENGTH - 80), st.sampled_from((1, 1, 1, 2, 3, 70))),
    min_size=1,
    max_size=NUM_SLOTS,
    unique_by=lambda span: span[0],
).map(lambda found: [Span(*span) for span in found])


def filled_slots() -> Slots:
    slots = Slots(2, NUM_SLOTS, KEY_HEADS, LENGTH, SIZE, torch.float64, CPU)
    generator = torch.Generator().manual_seed(0)
    slots.keys.copy_(torch.randn(slots.keys.shape, generator=generator, dtype=torch.float64))
    slots.values.copy_(torch.randn(slots.values.shape, generator=generator, dtype=torch.float64))
    return slots


@pytest.mark.parametrize("exact", [False, True])
@given(spans=spans)
def test_each_position_reads_its_own_row_up_to_itself(exact, spans):
    slots, where = filled_slots(), locate(spans, exact, torch.float64, CPU)
    total = sum(span.length for span in spans)
    queries = torch.randn(total, HEADS, SIZE, dtype=torch.float64)

    found = SlotView(slots, where, first=1).attend(0, queries)

    places = [(span.slot, span.start + offset) for span in spans for offset in range(span.length)]
    assert list(zip(where.slots.tolist(), where.positions.tolist(), strict=True)) == places
    for query, row, (slot, position) in zip(queries, found, places, strict=True):
        keys, values = (
            table[1, slot, :, : position + 1].repeat_interleave(HEADS // KEY_HEADS, dim=0)
            for table in (slots.keys, slots.values)
        )
        weights = (torch.einsum("hd,hsd->hs", query, keys) / SIZE**0.5).softmax(-1)
        assert torch.allclose(row, torch.einsum("hs,hsd->hd", weights, values), atol=1e-9)


@given(spans=spans)
def test_exact_attention_gives_a_row_the_same_shape_in_any_company(spans):
    where = locate(spans, True, torch.float32, CPU)

    for group in where.groups:
        assert group.width % WIDTH == 0
        last = where.positions[group.positions] // WIDTH
        assert (last == group.width // WIDTH - 1).all(), "no wider than its own positions need"
        assert group.shape[1] == 1 or group.alone


def test_what_is_written_lies_where_it_belongs():
    slots = Slots(2, NUM_SLOTS, KEY_HEADS, LENGTH, SIZE, torch.float32, CPU)
    where = locate([Span(4, 7, 2), Span(1, 0)], False, torch.float32, CPU)
    keys, values = torch.randn(2, 3, KEY_HEADS, SIZE).unbind()

    SlotView(slots, where, first=torch.tensor([0, 0, 1])).write(0, keys, values)

    assert torch.equal(slots.keys[0, 4, :, 7:9].transpose(0, 1), keys[:2])
    assert torch.equal(slots.values[1, 1, :, 0], values[2])
    assert int((slots.keys != 0).sum()) == keys.numel()


def test_what_is_kept_is_read_once():
    slots = filled_slots()
    view = SlotView(slots, locate([Span(0, 3), Span(2, 5)], False, torch.float64, CPU), keep=True)
    queries = torch.randn(2, HEADS, SIZE, dtype=torch.float64)
    before = view.attend(0, queries)

    slots.keys.zero_()

    assert torch.equal(view.attend(0, queries), before), "rows that lie apart were gathered"
