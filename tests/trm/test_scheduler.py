"""Scheduling policy, in microseconds: first come, first served, every slot comes back, nobody is half accepted."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from trm.engine.request import Event, Request, SamplingParams
from trm.engine.scheduler import Copy, Kept, Row, Scheduler
from trm.errors import BadRequest, Overloaded

NEVER_SEEN = itertools.count(1000)


def make_row(prompt: int | Sequence[int] = 3, steps: int = 2, **params: Any) -> Row:
    """A row with these prompt ids, or with so many that no other row begins with."""
    if isinstance(prompt, int):
        prompt = [next(NEVER_SEEN) for _ in range(prompt)]
    return Row(Request(tuple(prompt), SamplingParams(**params)), steps, ignore)


def ignore(event: Event) -> None:
    """Events are the engine's business."""


def slots_of(rows: Sequence[Row]) -> list[int]:
    return [row.slot for row in rows]


def admit(scheduler: Scheduler, *rows: Row) -> list[Copy]:
    scheduler.submit(rows)
    return scheduler.admit()


def keep(scheduler: Scheduler, ids: Sequence[int], steps: int = 2) -> int:
    """Let a row come and go that leaves `ids` in its slot, which is returned."""
    row = make_row([*ids, 0], steps)
    admit(scheduler, row)
    row.cached, slot = len(ids), row.slot
    scheduler.release(row, keep=True)
    return slot


class Loop:
    """The engine's loop without a model: a slot holds pairs of token and depth, as they were computed or copied."""

    def __init__(self, scheduler: Scheduler, prefill_chunk: int = 100, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.prefill_chunk = prefill_chunk
        self.rng = random.Random(seed)
        self.slots: list[list[tuple[int, int]]] = [[] for _ in range(scheduler.max_rows)]
        self.fed: list[list[Row]] = []  # by step
        self.clocks: dict[Row, int] = {}  # at a row's first token
        self.copies = 0

    def admit(self) -> None:
        copies = self.scheduler.admit()
        for row in self.scheduler.running:
            assert row.settled is (row.source is None)
            if row.source is not None:
                assert row.source.slot >= 0, "nobody waits for a row that has left"
                assert row.source.settled, "nor for one that waits itself"
                assert row.source.to_prefill, "nor for one that is done"
        for copy in copies:
            row, taken = copy.row, self.slots[copy.source][: copy.length]
            assert row.settled
            assert row.cached == 0
            assert 0 < copy.length < len(row.request.prompt_ids), "the last prompt token is never shared"
            assert [token for token, _ in taken] == list(row.request.prompt_ids[: copy.length])
            if self.scheduler.depth_matters:
                assert all(depth >= row.steps for _, depth in taken)
            self.copies += 1
            if self.rng.random() < 0.9:  # else it was not finite, and the row computes its own
                self.slots[row.slot] = [(token, min(depth, row.steps)) for token, depth in taken]
                row.cached = copy.length
        for row in self.scheduler.running:
            del self.slots[row.slot][row.cached :]  # whatever lay here is lost

    def compute(self) -> None:
        """One step of everything that has a slot."""
        for row, count in self.scheduler.prefilling(self.prefill_chunk):
            self._cache(row, row.request.prompt_ids[row.cached : row.cached + count])
        self.fed.append(self.scheduler.feeding())
        for row in self.fed[-1]:
            self.clocks.setdefault(row, self.scheduler.clock)
            row.thinking, row.step, row.halted_at = True, 0, []
        if thinking := self.scheduler.thinking():
            self.scheduler.clock += 1
            for row in thinking:
                row.step += 1
                row.note_halted([row.request.params.halts and self.rng.random() < 0.5])
        for row in self.scheduler.answered():
            self._cache(row, [row.token])
            row.passes, row.pass_steps = row.passes + 1, row.pass_steps + row.step
            row.reply.append(self.rng.randrange(2))
            row.thinking = False

    def step(self) -> list[Row]:
        """One step of the whole loop; returns the rows that it finished."""
        self.admit()
        self.compute()
        done = [row for row in self.scheduler.running if len(row.reply) >= row.request.params.max_tokens]
        for row in done:
            self.release(row, good=True)
        return done

    def release(self, row: Row, good: bool) -> None:
        slot = row.slot
        self.scheduler.release(row, keep=good)
        if slot >= 0 and not good:
            self.slots[slot] = []

    def _cache(self, row: Row, tokens: Sequence[int]) -> None:
        assert len(self.slots[row.slot]) == row.cached
        self.slots[row.slot] += [(token, row.steps) for token in tokens]
        row.cached += len(tokens)
        assert tuple(token for token, _ in self.slots[row.slot]) == row.cached_ids


def check(scheduler: Scheduler) -> None:
    """What must hold after every operation."""
    assert all(row.slot >= 0 for row in scheduler.running)
    used = slots_of(scheduler.running)
    assert sorted([*used, *scheduler._free]) == list(range(scheduler.max_rows)), "every slot is used or free, once"
    assert all(row.slot == -1 for row in scheduler.waiting)
    assert len(scheduler.waiting) + scheduler.reserved <= scheduler.max_queue + len(scheduler._free)
    assert not {id(row) for row in scheduler.running} & {id(row) for row in scheduler.waiting}


# Admission


def test_rows_are_admitted_in_order_of_arrival():
    scheduler = Scheduler(max_rows=2, max_queue=10)
    rows = [make_row() for _ in range(5)]
    scheduler.submit(rows)

    scheduler.admit()
    assert scheduler.running == rows[:2]
    scheduler.release(rows[1])
    scheduler.admit()
    assert scheduler.running == [rows[0], rows[2]]
    scheduler.release(rows[0])
    scheduler.release(rows[2])
    scheduler.admit()

    assert scheduler.running == rows[3:]
    assert not scheduler.waiting


def test_rows_that_find_a_free_slot_do_not_count_against_the_queue():
    scheduler = Scheduler(max_rows=3, max_queue=0)

    scheduler.submit([make_row() for _ in range(3)])

    with pytest.raises(Overloaded):
        scheduler.submit([make_row()])


def test_full_queue_is_overloaded_and_says_how_full():
    scheduler = Scheduler(max_rows=1, max_queue=2)
    scheduler.submit([make_row()])
    scheduler.admit()
    scheduler.submit([make_row(), make_row()])

    with pytest.raises(Overloaded, match="2 requests wait, 2 may"):
        scheduler.submit([make_row()])
    scheduler.release(scheduler.running[0])
    scheduler.admit()
    scheduler.submit([make_row()])
    assert len(scheduler.waiting) == 2


def test_samples_are_accepted_together_or_not_at_all():
    scheduler = Scheduler(max_rows=2, max_queue=2)
    scheduler.submit([make_row(), make_row()])
    before = list(scheduler.waiting)

    with pytest.raises(Overloaded):
        scheduler.submit([make_row() for _ in range(3)])

    assert list(scheduler.waiting) == before


def test_more_samples_than_ever_fit_are_a_bad_request():
    """Overloaded would invite to try again, for ever."""
    scheduler = Scheduler(max_rows=2, max_queue=3)

    with pytest.raises(BadRequest, match=r"6 samples.*takes 5") as caught:
        scheduler.submit([make_row() for _ in range(6)])

    assert caught.value.param == "n"
    scheduler.submit([make_row() for _ in range(5)])


def test_reserved_places_count_until_they_are_used_or_given_back():
    scheduler = Scheduler(max_rows=1, max_queue=2)
    scheduler.reserve(2)
    with pytest.raises(Overloaded, match="2 requests wait, 2 may"):
        scheduler.reserve(2)
    with pytest.raises(Overloaded):
        scheduler.submit([make_row(), make_row()])

    scheduler.submit([make_row()], reserved=2)  # one of the two is left over

    assert scheduler.reserved == 0
    scheduler.reserve(2)
    with pytest.raises(Overloaded):
        scheduler.reserve(1)


def test_who_finds_the_queue_full_learns_when_it_will_not_be():
    """At the pace of those that have left since there was somebody, the idle time before left out."""
    now = [1000.0]
    scheduler = Scheduler(max_rows=1, max_queue=6, now=lambda: now[0])

    def wait(count: int) -> int:
        with pytest.raises(Overloaded, match="try again in") as full:
            scheduler.reserve(count)
        return full.value.retry_after_s

    scheduler.submit([make_row() for _ in range(7)])
    assert wait(1) == 1, "nobody knows yet"
    now[0] += 20
    assert wait(1) == 20, "nobody has left in that time"
    for _ in range(4):
        scheduler.admit()
        scheduler.release(scheduler.running[0])
    scheduler.submit([make_row() for _ in range(4)])

    assert wait(1) == 5, "four have left in 20 seconds"
    assert wait(3) == 15
    now[0] += 12
    assert wait(1) == 8, "the pace is slackening"
    for row in [*scheduler.waiting]:
        scheduler.release(row)
    now[0] += 10_000
    scheduler.submit([make_row() for _ in range(7)])
    assert wait(1) == 1


def test_time_in_the_queue_ends_with_a_slot_or_with_leaving():
    now = [0.0]
    scheduler = Scheduler(max_rows=1, max_queue=2, now=lambda: now[0])
    first, second, third = rows = [make_row() for _ in range(3)]
    scheduler.submit(rows)
    now[0] = 1.0
    scheduler.admit()
    now[0] = 3.0
    scheduler.release(third)
    scheduler.release(first)
    now[0] = 4.0
    scheduler.admit()
    now[0] = 9.0
    scheduler.release(second)

    assert [row.queue_s for row in rows] == [1.0, 4.0, 3.0]


# Leaving


def test_cancelled_rows_are_found_wherever_they_are():
    scheduler = Scheduler(max_rows=2, max_queue=5)
    rows = [make_row() for _ in range(4)]
    scheduler.submit(rows)
    scheduler.admit()
    rows[0].cancelled = rows[3].cancelled = True

    gone = scheduler.cancelled()

    assert sorted(map(id, gone)) == sorted(map(id, [rows[0], rows[3]]))
    assert scheduler.running == rows[:2], "the engine releases them, when it knows what their slots are good for"
    for row in gone:
        scheduler.release(row)
    assert scheduler.running == [rows[1]]
    assert list(scheduler.waiting) == [rows[2]]
    assert scheduler.cancelled() == []
    check(scheduler)


@pytest.mark.parametrize("good", [True, False], ids=["kept", "not kept"])
def test_released_row_makes_room_for_another(good):
    scheduler = Scheduler(max_rows=1, max_queue=0)
    admit(scheduler, make_row())
    with pytest.raises(Overloaded):
        scheduler.submit([make_row()])

    scheduler.release(scheduler.running[0], keep=good)

    scheduler.submit([make_row()])
    check(scheduler)


def test_row_that_has_not_been_admitted_leaves_no_slot_behind():
    scheduler = Scheduler(max_rows=1, max_queue=1)
    rows = [make_row(), make_row()]
    admit(scheduler, *rows)

    scheduler.release(rows[1], keep=True)

    assert not scheduler.waiting
    assert scheduler.running == rows[:1]
    check(scheduler)


# What rows need next


def test_row_is_prefilled_up_to_its_last_prompt_token_and_then_fed():
    scheduler = Scheduler(max_rows=1, max_queue=0)
    row = make_row(range(10, 16))
    scheduler.submit([row])
    scheduler.admit()

    assert scheduler.feeding() == []
    assert scheduler.prefilling(2) == [(row, 2)]
    row.cached = 4
    assert scheduler.prefilling(2) == [(row, 1)]
    row.cached = 5
    assert scheduler.prefilling(2) == []
    assert scheduler.feeding() == [row]
    assert row.token == 15
    row.thinking = True
    assert scheduler.feeding() == []
    assert scheduler.thinking() == [row]


def test_prompt_of_one_token_needs_no_prefill():
    scheduler = Scheduler(max_rows=1, max_queue=0)
    row = make_row([10])
    scheduler.submit([row])
    scheduler.admit()

    assert scheduler.prefilling(10) == []
    assert scheduler.feeding() == [row]
    assert row.token == 10


def test_reply_tokens_follow_the_prompt():
    row = make_row([10, 11])
    row.reply += [7, 8]
    tokens = []
    for row.cached in range(4):
        tokens.append(row.token)

    assert tokens == [10, 11, 7, 8]


def test_prefill_budget_is_shared_oldest_first():
    """A long prompt is cut into pieces, so that it never stalls the rows that are already running."""
    scheduler = Scheduler(max_rows=3, max_queue=0)
    rows = [make_row(length) for length in (4, 101, 3)]
    scheduler.submit(rows)
    scheduler.admit()

    assert scheduler.prefilling(1) == [(rows[0], 1)]
    assert scheduler.prefilling(50) == [(rows[0], 3), (rows[1], 25)]
    assert scheduler.prefilling(1000) == [(rows[0], 3), (rows[1], 100), (rows[2], 2)]


@pytest.mark.parametrize("budget", [1, 7, 64, 256])
def test_prefill_pays_for_the_padding_too(budget):
    """31 short tails beside one long prompt would be padded to its length, 24 times the budget."""
    scheduler = Scheduler(max_rows=32, max_queue=0)
    scheduler.submit([make_row(3) for _ in range(31)] + [make_row(1000)])
    scheduler.admit()

    chosen = scheduler.prefilling(budget)

    assert chosen
    assert len(chosen) * max(count for _, count in chosen) <= budget


def test_prefill_budget_goes_to_the_oldest_though_calls_are_in_order_of_slots():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    first, older, younger = make_row(4), make_row(4), make_row(4)
    admit(scheduler, first, older)
    scheduler.release(first)
    admit(scheduler, younger)

    assert (younger.slot, older.slot) == (0, 1)
    assert scheduler.prefilling(3) == [(older, 3)]
    assert scheduler.prefilling(6) == [(younger, 3), (older, 3)]


# What a row knows


@pytest.mark.parametrize(
    ("steps", "draft", "halted", "steps_taken"),
    [
        (3, [], [[False], [False], [False]], [3]),
        (3, [], [[False], [True]], [2]),
        (3, [7], [[True, False], [False, False], [True, True]], [1, 3]),  # whoever halted stays so
        (3, [7, 8], [[False, True, False], [True, True, False], [False] * 3], [2, 1, 3]),
        (3, [7], [[True, True]], [1, 1]),
        (2, [7], [[False, True, True, True], [True, True, True, True]], [2, 1]),  # padding behind the row's own
    ],
    ids=str,
)
def test_places_halt_one_by_one_and_the_row_answers_with_the_last(steps, draft, halted, steps_taken):
    row = make_row(steps=steps)
    row.thinking, row.draft = True, draft
    for flags in halted:
        assert not row.answered
        row.step += 1
        row.note_halted(flags)

    assert row.answered
    assert [row.steps_taken(place) for place in range(1 + len(draft))] == steps_taken


def test_places_that_have_not_halted_have_taken_every_step():
    row = make_row(steps=5)
    row.thinking, row.draft, row.step = True, [7, 8], 5

    assert row.answered
    assert [row.steps_taken(place) for place in range(3)] == [5, 5, 5]


@pytest.mark.parametrize(
    ("thinking", "step", "steps", "halted_at", "answered"),
    [
        (True, 2, 3, [], False),
        (True, 3, 3, [], True),
        (True, 0, 0, [], True),
        (False, 0, 0, [], False),
        (False, 3, 3, [], False),
        (True, 1, 3, [1, 0], False),
        (True, 1, 3, [1, 1], True),
    ],
)
def test_row_is_answered_when_every_position_has_had_its_steps(thinking, step, steps, halted_at, answered):
    row = make_row(steps=steps)
    row.thinking, row.step, row.halted_at = thinking, step, halted_at

    assert row.answered is answered


@pytest.mark.parametrize(
    ("params", "passes", "pass_steps", "expected"),
    [
        ({}, 0, 0, 6),
        ({}, 2, 12, 6),
        ({"halt_threshold": 0.5}, 0, 0, 6),  # nothing is known yet
        ({"halt_threshold": 0.5}, 2, 5, 2.5),
        ({"halt_tolerance": 0.1}, 4, 6, 1.5),
    ],
    ids=str,
)
def test_expected_steps_are_the_effort_or_what_passes_took_so_far(params, passes, pass_steps, expected):
    row = make_row(steps=6, **params)
    row.passes, row.pass_steps = passes, pass_steps

    assert row.expected_steps == expected


def test_draft_has_the_room_that_the_next_token_leaves():
    row = make_row(max_tokens=3)
    rooms = [row.room_for_draft]
    for token in (7, 8):
        row.reply.append(token)
        rooms.append(row.room_for_draft)

    assert rooms == [2, 1, 0]


def test_row_that_may_not_draft_has_no_room_for_it():
    shallow, forbidden = make_row(steps=0), make_row()
    forbidden.may_draft = False

    assert shallow.room_for_draft == 0, "the backbone's own choice is the answer; there is nothing to verify"
    assert forbidden.room_for_draft == 0


def test_rows_are_called_by_slot():
    scheduler = Scheduler(max_rows=3, max_queue=0)
    rows = [make_row(1) for _ in range(3)]
    admit(scheduler, *rows)
    scheduler.running.reverse()

    assert slots_of(scheduler.feeding()) == [0, 1, 2]
    for row in rows:
        row.thinking = True
    assert slots_of(scheduler.thinking()) == [0, 1, 2]
    assert scheduler.answered() == []
    for row in rows[:2]:
        row.step = row.steps
    assert scheduler.thinking() == rows[2:]
    assert scheduler.answered() == rows[:2]


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
        scheduler._free[slot] = Kept(tuple(ids), 2)
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
    scheduler = Scheduler(2, 0, depth_matters)
    if place == "free slot":
        slot = keep(scheduler, [1, 2, 3], there)
    else:
        source = make_row([1, 2, 3, 4], there)
        admit(scheduler, source)
        source.cached, slot = 0 if place == "row being cached" else 3, source.slot
    row = make_row([1, 2, 3, 5], wanted)

    copies = admit(scheduler, row)

    if place == "row being cached":
        assert (row.source is not None) is shared
        assert copies == []
    else:
        assert copies == ([Copy(row, slot, 3)] if shared else [])
    assert row.settled or row.source


def test_deep_prefix_is_preferred_to_a_longer_shallow_one_where_depth_matters():
    scheduler = Scheduler(3, 0, depth_matters=True)
    _, deep = keep(scheduler, [1, 2, 3], 1), keep(scheduler, [1, 2], 4)
    row = make_row([1, 2, 3, 4], 4)

    assert admit(scheduler, row) == [Copy(row, deep, 2)]


def test_slot_is_as_deep_as_the_last_row_in_it():
    """A shallow row may have reused a deep prefix in place, and written its own tokens behind."""
    scheduler = Scheduler(1, 0, depth_matters=True)
    keep(scheduler, [1, 2, 3], 4)
    shallow = make_row([1, 2, 3, 4, 5], 1)
    admit(scheduler, shallow)
    shallow.cached = 4
    scheduler.release(shallow, keep=True)

    assert admit(scheduler, make_row([1, 2, 3, 4, 6], 4)) == []


# The depth clock


@pytest.mark.parametrize("late", [1, 2, 3, 5])
def test_rows_of_equal_effort_end_up_feeding_together(late):
    """Each arrives at its own tick; unaligned, every tick would pass a part of them through the backbone."""
    scheduler = Scheduler(max_rows=3, max_queue=0)
    loop = Loop(scheduler)
    rows = [make_row(1, steps=4) for _ in range(3)]
    for row in rows:
        scheduler.submit([row])
        for _ in range(late):
            loop.step()
    for _ in range(12):
        loop.step()

    last = loop.fed[-12:]
    assert [len(fed) for fed in last if fed] == [3, 3, 3]
    assert all(last[at] == last[at + 4] for at in range(8)), "every fourth tick"


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("ticks", [1, 2, 3, 4])
def test_first_token_waits_for_a_multiple_of_the_effort(steps, ticks):
    scheduler = Scheduler(max_rows=2, max_queue=0)
    loop = Loop(scheduler)
    scheduler.submit([make_row(1, steps=7)])
    for _ in range(ticks):
        loop.step()
    row = make_row(1, steps=steps)
    scheduler.submit([row])
    for _ in range(steps):
        loop.step()

    assert loop.clocks[row] == -(-ticks // steps) * steps, "the next one, no later"


@pytest.mark.parametrize("params", [{"halt_threshold": 0.5}, {"halt_tolerance": 0.1}], ids=str)
def test_row_that_may_halt_does_not_wait_for_its_first_token(params):
    """Nobody knows its pace yet."""
    scheduler = Scheduler(max_rows=3, max_queue=0)
    busy, halting, steady = make_row(1, steps=4), make_row(1, steps=4, **params), make_row(1, steps=4)
    admit(scheduler, busy, halting, steady)
    busy.thinking, scheduler.clock = True, 1

    assert scheduler.feeding() == [halting]


@pytest.mark.parametrize(("taken", "pace"), [([3, 3], 3), ([3, 4, 2, 3], 3), ([1, 1], 1), ([1, 2, 2], 2)], ids=str)
def test_rows_that_halt_gather_at_their_mean_pace(taken, pace):
    scheduler = Scheduler(max_rows=2, max_queue=0)
    busy, halting = make_row(1, steps=16), make_row(1, steps=16, halt_tolerance=0.1)
    admit(scheduler, busy, halting)
    halting.passes, halting.pass_steps = len(taken), sum(taken)
    busy.thinking = True
    begun = []
    for scheduler.clock in range(1, 13):
        begun += [scheduler.clock] if scheduler.feeding() == [halting] else []

    assert begun == list(range(pace, 13, pace))


def test_effort_zero_does_not_wait():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    busy, row = make_row(1, steps=4), make_row(1, steps=0)
    admit(scheduler, busy, row)
    busy.thinking, scheduler.clock = True, 3

    assert scheduler.feeding() == [row]
    row.thinking = True
    assert scheduler.answered() == [row], "without a single step"
    assert scheduler.thinking() == [busy]


def test_nobody_waits_for_an_idle_clock():
    scheduler = Scheduler(max_rows=1, max_queue=0)
    row = make_row(1, steps=4)
    admit(scheduler, row)
    scheduler.clock = 3

    assert scheduler.feeding() == [row]
    assert scheduler.clock == 0


def test_clock_goes_on_while_anybody_thinks():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    busy, row = make_row(1, steps=4), make_row(1, steps=4)
    admit(scheduler, busy, row)
    busy.thinking, scheduler.clock = True, 3

    assert scheduler.feeding() == []
    assert scheduler.clock == 3


# Many operations


def some_row(rng: random.Random) -> Row:
    """A prompt of few different tokens: many begin alike, some are equal, some continue another's reply."""
    prompt = [rng.randrange(2) for _ in range(rng.randint(1, 4))] + [0] * rng.randint(0, 5)
    halting = {"halt_threshold": 0.5} if rng.random() < 0.2 else {}
    return make_row(prompt, steps=rng.randrange(4), max_tokens=rng.randint(1, 6), **halting)


@pytest.mark.parametrize("depth_matters", [False, True], ids=["any depth", "depth matters"])
@pytest.mark.parametrize("max_rows", [1, 3, 8])
@pytest.mark.parametrize("max_queue", [0, 5])
def test_no_slot_leaks_in_ten_thousand_operations(max_rows, max_queue, depth_matters):
    """Against a model that keeps nothing but lists, and slots that remember which tokens were put into them."""
    rng = random.Random(f"{max_rows} {max_queue}")
    scheduler = Scheduler(max_rows, max_queue, depth_matters)
    loop = Loop(scheduler, prefill_chunk=2)
    alive: list[Row] = []  # in order of arrival
    reserved: list[int] = []
    finished = accepted = waits = 0
    for _ in range(10_000):
        match rng.randrange(10):
            case 0:
                rows = [some_row(rng) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
                if len(rows) <= max_rows + max_queue - len(alive) - sum(reserved):
                    scheduler.submit(rows)
                    alive += rows
                    accepted += len(rows)
                else:
                    never = len(rows) > max_rows + max_queue
                    with pytest.raises(BadRequest if never else Overloaded):
                        scheduler.submit(rows)
            case 1:
                loop.admit()
                assert not scheduler.waiting or len(scheduler.running) == max_rows
                waits += sum(row.source is not None for row in scheduler.running)
            case 2 | 3 | 4:
                loop.compute()
            case 5 if scheduler.running and rng.random() < 0.5:
                row = rng.choice(scheduler.running)
                loop.release(row, good=rng.random() < 0.8)
                assert row.slot == -1
                alive.remove(row)
                finished += 1
            case 6 if alive and rng.random() < 0.3:
                rng.choice(alive).cancelled = True
            case 7:
                expected = [row for row in alive if row.cancelled]
                gone = scheduler.cancelled()
                assert sorted(map(id, gone)) == sorted(map(id, expected))
                for row in gone:
                    loop.release(row, good=rng.random() < 0.5)
                alive = [row for row in alive if not row.cancelled]
                finished += len(gone)
            case 8 if len(alive) + sum(reserved) < max_rows + max_queue and rng.random() < 0.3:
                reserved.append(1)
                scheduler.reserve(1)
            case 9 if reserved:
                rows = [some_row(rng) for _ in range(rng.randrange(2))]  # else the place is given back
                scheduler.submit(rows, reserved.pop())
                alive += rows
                accepted += len(rows)
        check(scheduler)
        running = [row for row in alive if row.slot >= 0]
        assert [*running, *scheduler.waiting] == alive, "first come, first served"
        assert len(scheduler.running) + len(scheduler.waiting) == len(alive) == accepted - finished
    assert finished > 250, "the mix of operations must make rows come and go"
    assert loop.copies > 40
    assert waits > 20 or max_rows == 1


@pytest.mark.parametrize("depth_matters", [False, True], ids=["any depth", "depth matters"])
@pytest.mark.parametrize("seed", range(5))
def test_every_row_gets_its_turn(seed, depth_matters):
    """However rows wait for each other's prefixes and for the clock: some row advances in every step."""
    rng = random.Random(seed)
    scheduler = Scheduler(4, 200, depth_matters)
    loop = Loop(scheduler, prefill_chunk=3, seed=seed)
    rows = [some_row(rng) for _ in range(200)]
    scheduler.submit(rows)
    done: list[Row] = []
    work = sum(len(row.request.prompt_ids) + 4 * row.request.params.max_tokens for row in rows)
    for _ in range(work):
        done += loop.step()
        check(scheduler)

    assert sorted(map(id, done)) == sorted(map(id, rows))
    assert all(len(row.reply) == row.request.params.max_tokens for row in rows)
    steady = [row for row in rows if not row.request.params.halts]
    assert all(loop.clocks[row] % max(1, row.steps) == 0 for row in steady)
