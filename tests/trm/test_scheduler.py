"""Scheduling policy, in microseconds: first come, first served, every slot comes back, nobody is half accepted."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from trm.engine.request import Event, Request, SamplingParams
from trm.engine.scheduler import Row, Scheduler
from trm.errors import BadRequest, Overloaded


def make_row(prompt_length: int = 3, steps: int = 2, **params: Any) -> Row:
    return Row(Request(tuple(range(10, 10 + prompt_length)), SamplingParams(**params)), steps, ignore)


def ignore(event: Event) -> None:
    """Events are the engine's business."""


def slots_of(rows: Sequence[Row]) -> list[int]:
    return [row.slot for row in rows]


def check(scheduler: Scheduler) -> None:
    """What must hold after every operation."""
    used = slots_of(scheduler.running)
    assert sorted([*used, *scheduler._free]) == list(range(scheduler.max_rows)), "every slot is used or free, once"
    assert all(row.slot == -1 for row in scheduler.waiting)
    assert len(scheduler.waiting) <= scheduler.max_queue + len(scheduler._free)
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


# Leaving


def test_cancelled_rows_leave_from_wherever_they_are():
    scheduler = Scheduler(max_rows=2, max_queue=5)
    rows = [make_row() for _ in range(4)]
    scheduler.submit(rows)
    scheduler.admit()
    rows[0].cancelled = rows[3].cancelled = True

    gone = scheduler.take_cancelled()

    assert sorted(map(id, gone)) == sorted(map(id, [rows[0], rows[3]]))
    assert scheduler.running == [rows[1]]
    assert list(scheduler.waiting) == [rows[2]]
    assert scheduler.take_cancelled() == []
    check(scheduler)


def test_cancelled_row_makes_room_for_another():
    scheduler = Scheduler(max_rows=1, max_queue=0)
    scheduler.submit([make_row()])
    scheduler.admit()
    scheduler.running[0].cancelled = True
    scheduler.take_cancelled()

    scheduler.submit([make_row()])


# What rows need next


def test_row_is_prefilled_up_to_its_last_prompt_token_and_then_fed():
    scheduler = Scheduler(max_rows=1, max_queue=0)
    row = make_row(prompt_length=6)
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
    row = make_row(prompt_length=1)
    scheduler.submit([row])
    scheduler.admit()

    assert scheduler.prefilling(10) == []
    assert scheduler.feeding() == [row]
    assert row.token == 10


def test_reply_tokens_follow_the_prompt():
    row = make_row(prompt_length=2)
    row.reply += [7, 8]
    tokens = []
    for row.cached in range(4):
        tokens.append(row.token)

    assert tokens == [10, 11, 7, 8]


def test_prefill_budget_is_shared_oldest_first():
    """A long prompt is cut into pieces, so that it never stalls the rows that are already running."""
    scheduler = Scheduler(max_rows=3, max_queue=0)
    rows = [make_row(prompt_length=length) for length in (4, 101, 3)]
    scheduler.submit(rows)
    scheduler.admit()

    assert scheduler.prefilling(1) == [(rows[0], 1)]
    assert scheduler.prefilling(50) == [(rows[0], 3), (rows[1], 47)]
    assert scheduler.prefilling(1000) == [(rows[0], 3), (rows[1], 100), (rows[2], 2)]


# Many operations


@pytest.mark.parametrize("max_rows", [1, 3, 8])
@pytest.mark.parametrize("max_queue", [0, 5])
def test_no_slot_leaks_in_ten_thousand_operations(max_rows, max_queue):
    """Against a model that keeps nothing but lists."""
    rng = random.Random(f"{max_rows} {max_queue}")
    scheduler = Scheduler(max_rows, max_queue)
    alive: list[Row] = []  # in order of arrival
    finished = accepted = 0
    for _ in range(10_000):
        match rng.randrange(5):
            case 0:
                rows = [make_row(rng.randint(1, 9)) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
                if len(rows) <= max_rows + max_queue - len(alive):
                    scheduler.submit(rows)
                    alive += rows
                    accepted += len(rows)
                else:
                    never = len(rows) > max_rows + max_queue
                    with pytest.raises(BadRequest if never else Overloaded):
                        scheduler.submit(rows)
            case 1:
                scheduler.admit()
                assert not scheduler.waiting or len(scheduler.running) == max_rows
            case 2 if scheduler.running:
                row = rng.choice(scheduler.running)
                scheduler.release(row)
                assert row.slot == -1
                alive.remove(row)
                finished += 1
            case 3 if alive:
                rng.choice(alive).cancelled = True
            case 4:
                expected = [row for row in alive if row.cancelled]
                gone = scheduler.take_cancelled()
                assert sorted(map(id, gone)) == sorted(map(id, expected))
                alive = [row for row in alive if not row.cancelled]
                finished += len(gone)
        check(scheduler)
        running = [row for row in alive if row.slot >= 0]
        assert [*running, *scheduler.waiting] == alive, "first come, first served"
        assert len(scheduler.running) + len(scheduler.waiting) == len(alive) == accepted - finished
    assert finished > 500, "the mix of operations must make rows come and go"
