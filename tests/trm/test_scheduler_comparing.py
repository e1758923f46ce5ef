"""What is taken over of prompts that begin alike: found exactly, without reading the prompts."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trm.scheduling import admit, make_row
from trm.engine import prefix
from trm.engine.prefix import BLOCK, Prefix
from trm.engine.scheduler import Copy, Scheduler

NEAR_BLOCKS = st.integers(-2, 3 * BLOCK + 2)


def naive(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Counted(int):
    """A token that counts how often it is compared; no two of them are the same object."""

    compared = 0
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other


@pytest.mark.parametrize("shared", [0, BLOCK - 1, 3990], ids=["nothing", "a-little", "nearly-all"])
def test_admitting_does_not_read_the_prompts(shared):
    """The event loop waits meanwhile: 16 rows beside 16 of 30,000 tokens took a fifth of a second."""
    length, beside = 4000, 16
    others = itertools.count(10**6)

    def prompt() -> list[int]:
        return [*map(Counted, range(shared)), *(Counted(next(others)) for _ in range(length - shared))]

    scheduler = Scheduler(max_rows=2 * beside, max_queue=0)
    running = [make_row(prompt()) for _ in range(beside)]
    admit(scheduler, *running)
    for row in running:
        row.settled, row.source, row.cached = True, None, length
    scheduler.submit([make_row(prompt()) for _ in range(beside)])
    Counted.compared = 0

    copies = scheduler.admit()

    assert [copy.length for copy in copies] == [shared] * (beside if shared else 0)
    pairs = beside * 3 * beside  # with the slots that are free, the rows that run, and those admitted just now
    assert Counted.compared <= pairs * BLOCK


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.tuples(NEAR_BLOCKS, NEAR_BLOCKS).map(lambda pair: tuple(max(1, n) for n in pair)),
    differ_at=st.integers(0, 3 * BLOCK),
    reply=st.integers(0, 2 * BLOCK),
    running=st.booleans(),
)
def test_lengths_are_exact_inside_a_block_and_at_its_edges(lengths, differ_at, reply, running):
    """Of a prompt and its reply, in a slot or still running, and of one that is not cached yet."""
    scheduler = Scheduler(max_rows=2, max_queue=0)
    first = make_row(range(lengths[0]), max_tokens=reply + 1)
    admit(scheduler, first)
    for token in range(lengths[0], lengths[0] + reply):
        first.take(token)
    first.cached = max(0, lengths[0] + reply - 1)
    tokens, slot = list(first.cached_ids), first.slot
    if not running:
        scheduler.release(first, keep=True)
    wanted = [token if at != differ_at else -1 for at, token in enumerate(range(lengths[1]))]
    row = make_row(wanted)

    copies = admit(scheduler, row)

    length = naive(wanted[:-1], tokens)
    assert copies == ([Copy(row, slot, length)] if length else [])


def test_prompt_that_is_being_cached_is_compared_as_a_whole():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    first = make_row(range(3 * BLOCK))
    second = make_row([*range(2 * BLOCK + 5), -1, -1])
    admit(scheduler, first, second)

    assert (second.source, second.source_length) == (first, 2 * BLOCK + 5)


def test_slot_keeps_no_more_than_what_was_cached_there():
    """A row that was cancelled early has digests of its whole prompt, and keys of its beginning."""
    scheduler = Scheduler(max_rows=2, max_queue=0)
    first = make_row(range(4 * BLOCK))
    admit(scheduler, first)
    first.cached, slot = BLOCK + 3, first.slot
    scheduler.release(first, keep=True)
    row = make_row(range(4 * BLOCK))

    assert admit(scheduler, row) == [Copy(row, slot, BLOCK + 3)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 3), max_size=BLOCK), max_size=8), st.integers(0, 4 * BLOCK))
def test_sequence_that_grew_is_like_one_that_was_there_at_once(pieces, most):
    grown, whole = Prefix(), list(itertools.chain(*pieces))
    for piece in pieces:
        fork = grown.fork()
        grown.extend(piece)
        fork.extend([9] * BLOCK)

    assert grown.equal_tokens(Prefix(whole), most) == min(len(whole), most) // BLOCK * BLOCK


def test_blocks_are_told_apart_by_all_that_precedes_them():
    one, other = [1] * BLOCK, [2] * BLOCK

    assert Prefix([*one, *one]).equal_tokens(Prefix([*other, *one]), 2 * BLOCK) == 0
    assert prefix.common_length([1, 2, 3], [1, 2, 4]) == prefix.common_length([1, 2], [1, 2, 4]) == 2
