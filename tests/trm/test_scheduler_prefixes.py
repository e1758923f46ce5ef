"""Scheduling policy where prompts begin alike: who takes over what, and who waits for whom."""

import pytest

from tests.trm.scheduling import CONTEXT, OTHER, STATE, admit, keep, make_row, slots_of
from trm.engine.scheduler import Copy, Kept, Scheduler

# Shared prefixes


def test_new_row_takes_over_what_a_row_left():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    slot = keep(scheduler, [1, 2, 3])
    row = make_row([1, 2, 9, 9])

    assert admit(scheduler, row) == [Copy(row, slot, 2)]
    assert row.settled
    assert row.cached == 0, "the engine says so when the copy is made"


@pytest.mark.parametrize("kept", [[], [5, 6], [2, 1]], ids=str)
def test_nothing_in_common_nothing_taken_over(kept):
    scheduler = Scheduler(max_rows=2, max_queue=0)
    keep(scheduler, kept)
    row = make_row([1, 2, 3])

    assert admit(scheduler, row) == []
    assert row.settled


def test_slot_that_is_not_good_is_never_shared():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    first, second = make_row([1, 2, 3, 4]), make_row([1, 2, 3, 4])
    admit(scheduler, first)
    first.cached = 4
    scheduler.release(first, keep=False)

    assert admit(scheduler, second) == []


def test_slot_in_use_holds_nothing_of_its_past():
    scheduler = Scheduler(max_rows=1, max_queue=1)
    keep(scheduler, [1, 2, 3])
    row = make_row([5, 6, 7])
    admit(scheduler, row)
    scheduler.release(row, keep=True)  # before it cached anything

    assert admit(scheduler, make_row([1, 2, 3, 4])) == []


@pytest.mark.parametrize(("cached", "shared"), [(1, 1), (3, 3), (5, 5), (6, 6), (7, 6)], ids=lambda value: str(value))
def test_last_prompt_token_is_never_shared(cached, shared):
    """It decodes: its logits are needed, and they are not in the cache."""
    scheduler = Scheduler(max_rows=2, max_queue=0)
    slot = keep(scheduler, range(10, 10 + cached))
    row = make_row(range(10, 17))

    assert admit(scheduler, row) == [Copy(row, slot, shared)]


def test_prompt_of_one_token_takes_over_nothing():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    keep(scheduler, [1, 2, 3])

    assert admit(scheduler, make_row([1])) == []


def test_replies_are_taken_over_too():
    """The next turn of a conversation begins with the last one and its reply."""
    scheduler = Scheduler(max_rows=3, max_queue=0)
    running, left = make_row([1, 2]), make_row([5, 6])
    admit(scheduler, running, left)
    running.reply, running.cached = [3, 4], 3
    left.reply, left.cached = [7, 8], 3
    slot = left.slot
    scheduler.release(left, keep=True)
    after_running, after_left = make_row([1, 2, 3, 4, 9]), make_row([5, 6, 7, 8, 9])

    assert admit(scheduler, after_running, after_left) == [
        Copy(after_running, running.slot, 3),  # its newest token is not cached yet
        Copy(after_left, slot, 3),
    ]


@pytest.mark.parametrize(
    ("in_slots", "in_rows", "winner"),
    [
        ([[1], [1, 2, 3], [1, 2]], [], ("slot", 1)),
        ([], [[1], [1, 2, 3], [1, 2]], ("row", 1)),
        ([[1, 2]], [[1, 2, 3]], ("row", 0)),
        ([[1, 2, 3]], [[1, 2]], ("slot", 0)),
        ([[1, 2, 3, 4, 7, 7], [1, 2, 3, 8, 8, 8, 8, 8]], [[1, 2, 8]], ("slot", 0)),
    ],
    ids=str,
)
def test_longest_match_wins(in_slots, in_rows, winner):
    scheduler = Scheduler(max_rows=8, max_queue=0)
    running = [make_row(ids) for ids in in_rows]
    admit(scheduler, *running)
    for row in running:
        row.settled, row.source, row.cached = True, None, len(row.request.prompt_ids)
    slots = {"row": slots_of(running), "slot": list(scheduler._free)}
    for slot, ids in zip(slots["slot"], in_slots, strict=False):
        scheduler._free[slot] = Kept(CONTEXT, tuple(ids), 2)
    row = make_row([1, 2, 3, 4, 5])
    held = {"row": in_rows, "slot": in_slots}[winner[0]][winner[1]]
    length = next(n for n in range(5, 0, -1) if held[:n] == [1, 2, 3, 4][:n] and n <= len(held))

    assert admit(scheduler, row) == [Copy(row, slots[winner[0]][winner[1]], min(length, 4))]


def test_least_recently_used_slot_is_taken():
    scheduler = Scheduler(max_rows=3, max_queue=0)
    slots = [keep(scheduler, [token] * 3) for token in (1, 2, 3)]
    rows = [make_row() for _ in range(3)]
    admit(scheduler, *rows)

    assert slots_of(rows) == slots
    for slot in (1, 2, 0):
        scheduler.release(rows[slot], keep=True)
    again = [make_row() for _ in range(3)]
    admit(scheduler, *again)
    assert slots_of(again) == [1, 2, 0]


def test_source_becomes_recently_used():
    """What many requests share, a system prompt, must not be the first to go."""
    scheduler = Scheduler(max_rows=3, max_queue=0)
    popular, second, third = (keep(scheduler, [token] * 7) for token in (1, 2, 3))
    user, other = make_row([1, 1, 1, 0]), make_row()

    assert admit(scheduler, user, other) == [Copy(user, popular, 3)]
    assert slots_of([user, other]) == [second, third]


@pytest.mark.parametrize(
    ("kept", "in_place"),
    [([1, 2], True), ([1, 2, 3, 3], True), ([1, 2, 3, 3, 3], False), ([1, 2, 3, 3, 3, 3, 3, 3], False)],
    ids=str,
)
def test_slot_that_holds_little_else_is_reused_in_place(kept, in_place):
    """A conversation goes on where it was; a prompt that others may share stays for them."""
    scheduler = Scheduler(max_rows=3, max_queue=0)
    slot = keep(scheduler, kept)
    row = make_row([1, 2, 9])

    assert admit(scheduler, row) == [Copy(row, slot, 2)]
    assert (row.slot == slot) is in_place


def test_only_slot_is_reused_in_place_whatever_else_it_holds():
    scheduler = Scheduler(max_rows=1, max_queue=0)
    keep(scheduler, [1, 2, 3, 3, 3, 3])
    row = make_row([1, 2, 9])

    assert admit(scheduler, row) == [Copy(row, 0, 2)]
    assert row.slot == 0


def test_slot_is_copied_before_another_row_takes_it():
    """Copies are made in the order in which they are returned."""
    scheduler = Scheduler(max_rows=2, max_queue=1)
    keep(scheduler, [1, 2, 3, 0, 0, 0, 0])
    keep(scheduler, [4, 5, 6, 0, 0, 0, 0])
    like_second, like_first = make_row([4, 5, 6, 9]), make_row([1, 2, 3, 9])

    copies = admit(scheduler, like_second, like_first)

    assert copies == [Copy(like_second, 1, 3)]
    assert slots_of([like_second, like_first]) == [0, 1], "the first row overwrote what the second could have used"


# Waiting for a prefix


def test_row_waits_for_one_that_is_caching_its_prompt():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    first, second = make_row(range(10, 20)), make_row(range(10, 20))

    assert admit(scheduler, first, second) == []
    assert second.source is first
    assert not second.settled
    assert scheduler.prefilling(100) == [(first, 9)], "the second does not pay for the same tokens"
    first.cached = 8
    assert scheduler.admit() == []
    assert scheduler.feeding() == []
    first.cached = 9
    assert scheduler.admit() == [Copy(second, first.slot, 9)]
    assert second.settled
    assert second.source is None
    assert scheduler.admit() == [], "once"


def test_row_waits_only_for_what_it_shares():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    first, second = make_row([1, 2, 3, 4, 5, 6]), make_row([1, 2, 3, 9, 9])
    admit(scheduler, first, second)
    first.cached = 2
    assert scheduler.admit() == []
    first.cached = 3

    assert scheduler.admit() == [Copy(second, first.slot, 3)]


def test_prefix_that_is_cached_already_is_not_waited_for():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    first, second = make_row([1, 2, 3, 4, 5, 6]), make_row([1, 2, 3, 9, 9])
    admit(scheduler, first)
    first.cached = 4

    assert admit(scheduler, second) == [Copy(second, first.slot, 3)]


def test_all_samples_wait_for_the_first():
    scheduler = Scheduler(max_rows=4, max_queue=0)
    rows = [make_row([1, 2, 3, 4]) for _ in range(4)]
    admit(scheduler, *rows)

    assert scheduler.prefilling(100) == [(rows[0], 3)]
    rows[0].cached = 3
    assert scheduler.admit() == [Copy(row, rows[0].slot, 3) for row in rows[1:]]


@pytest.mark.parametrize("cached", [0, 2])
def test_row_whose_source_fails_computes_its_own(cached):
    scheduler = Scheduler(max_rows=3, max_queue=0)
    first, second, third = (make_row([1, 2, 3, 4, 5]) for _ in range(3))
    admit(scheduler, first, second, third)
    first.cached = cached

    scheduler.release(first)

    assert scheduler.admit() == []
    assert second.settled
    assert third.source is second, "one of them goes ahead, the other waits again"
    assert scheduler.prefilling(100) == [(second, 4)]


def test_row_whose_source_is_cancelled_goes_on():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    first, second = make_row([1, 2, 3]), make_row([1, 2, 3])
    admit(scheduler, first, second)
    first.cancelled = True
    for row in scheduler.cancelled():
        scheduler.release(row)
    scheduler.admit()

    assert scheduler.prefilling(100) == [(second, 2)]


def test_row_whose_source_fails_falls_back_on_a_shorter_prefix():
    scheduler = Scheduler(max_rows=3, max_queue=0)
    slot = keep(scheduler, [1, 2, 9, 9, 9, 9])
    first, second = make_row([1, 2, 3, 4, 5]), make_row([1, 2, 3, 4, 5])
    assert admit(scheduler, first, second) == [Copy(first, slot, 2)]
    scheduler.release(first)

    assert scheduler.admit() == [Copy(second, slot, 2)]


def test_row_whose_source_has_finished_takes_over_from_its_slot():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    first, second = make_row([1, 2, 3, 4]), make_row([1, 2, 3, 4])
    admit(scheduler, first, second)
    first.cached, slot = 4, first.slot
    scheduler.release(first, keep=True)

    assert scheduler.admit() == [Copy(second, slot, 3)]


# Depth


@pytest.mark.parametrize("place", ["free slot", "running row", "row being cached"])
@pytest.mark.parametrize(
    ("depth_matters", "there", "wanted", "shared"),
    [(False, 1, 4, True), (True, 1, 4, False), (True, 4, 4, True), (True, 4, 1, True), (True, 4, 0, True)],
)
def test_shallow_prefix_serves_no_deeper_row_where_depth_matters(place, depth_matters, there, wanted, shared):
    scheduler, decoder = Scheduler(2, 0), STATE if depth_matters else CONTEXT
    if place == "free slot":
        slot = keep(scheduler, [1, 2, 3], there, decoder)
    else:
        source = make_row([1, 2, 3, 4], there, decoder)
        admit(scheduler, source)
        source.cached, slot = 0 if place == "row being cached" else 3, source.slot
    row = make_row([1, 2, 3, 5], wanted, decoder)

    copies = admit(scheduler, row)

    if place == "row being cached":
        assert (row.source is not None) is shared
        assert copies == []
    else:
        assert copies == ([Copy(row, slot, 3)] if shared else [])
    assert row.settled or row.source


def test_deep_prefix_is_preferred_to_a_longer_shallow_one_where_depth_matters():
    scheduler = Scheduler(3, 0)
    _, deep = keep(scheduler, [1, 2, 3], 1, STATE), keep(scheduler, [1, 2], 4, STATE)
    row = make_row([1, 2, 3, 4], 4, STATE)

    assert admit(scheduler, row) == [Copy(row, deep, 2)]


def test_slot_is_as_deep_as_the_last_row_in_it():
    """A shallow row may have reused a deep prefix in place, and written its own tokens behind."""
    scheduler = Scheduler(1, 0)
    keep(scheduler, [1, 2, 3], 4, STATE)
    shallow = make_row([1, 2, 3, 4, 5], 1, STATE)
    admit(scheduler, shallow)
    shallow.cached = 4
    scheduler.release(shallow, keep=True)

    assert admit(scheduler, make_row([1, 2, 3, 4, 6], 4, STATE)) == []


# Decoders


@pytest.mark.parametrize("place", ["free slot", "running row", "row being cached"])
def test_prefix_of_another_decoder_is_none(place):
    scheduler = Scheduler(3, 0)
    if place == "free slot":
        keep(scheduler, [1, 2, 3, 4], decoder=OTHER)
        own = keep(scheduler, [1, 2])
    else:
        longer, shorter = make_row([1, 2, 3, 4], decoder=OTHER), make_row([1, 2, 9])
        admit(scheduler, longer, shorter)
        longer.cached, shorter.cached, own = (3, 2, shorter.slot) if place == "running row" else (0, 2, shorter.slot)
    row = make_row([1, 2, 3, 5])

    assert admit(scheduler, row) == [Copy(row, own, 2)]


def test_what_slots_hold_of_a_decoder_can_be_forgotten():
    scheduler = Scheduler(3, 0)
    forgotten, kept = keep(scheduler, [1, 2], decoder=OTHER), keep(scheduler, [1, 2])
    running = make_row([1, 2, 3], decoder=OTHER)
    admit(scheduler, running)
    running.cached = 2

    OTHER.closed = True
    try:
        scheduler.forget(OTHER)
        scheduler.release(running, keep=True)
    finally:
        OTHER.closed = False

    assert [held.decoder for held in scheduler._free.values()] == [None, None, CONTEXT]
    assert list(scheduler._free)[-1] == kept != forgotten, "and those slots are given up first"
