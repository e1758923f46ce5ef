"""Scheduling policy, in microseconds: first come, first served, every slot comes back, nobody is half accepted."""

import random
from collections.abc import Sequence

import pytest

from tests.trm.scheduling import CONTEXT, OTHER, STATE, Loop, admit, check, make_row, slots_of
from trm.engine.hosted import Hosted
from trm.engine.row import Pass, Row
from trm.engine.scheduler import Scheduler
from trm.errors import BadRequest, Overloaded

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

    with pytest.raises(Overloaded, match="2 requests wait, and at most 2 may"):
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

    with pytest.raises(BadRequest, match=r"6 samples.*takes at most 5") as caught:
        scheduler.submit([make_row() for _ in range(6)])

    assert caught.value.param == "n"
    scheduler.submit([make_row() for _ in range(5)])


def test_reserved_places_count_until_they_are_used_or_given_back():
    scheduler = Scheduler(max_rows=1, max_queue=2)
    scheduler.reserve(2)
    with pytest.raises(Overloaded, match="2 requests wait, and at most 2 may"):
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

    assert [row.taken.queue_s for row in rows] == [1.0, 4.0, 3.0]


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
    row.work = Pass()
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
    assert scheduler.prefilling(50) == [(rows[0], 3), (rows[1], 47)]
    assert scheduler.prefilling(1000) == [(rows[0], 3), (rows[1], 100), (rows[2], 2)]


@pytest.mark.parametrize("budget", [1, 7, 64, 256])
def test_prefill_keeps_its_budget_and_uses_it_up(budget):
    """31 short tails beside one long prompt."""
    scheduler = Scheduler(max_rows=32, max_queue=0)
    scheduler.submit([make_row(3) for _ in range(31)] + [make_row(1000)])
    scheduler.admit()

    chosen = scheduler.prefilling(budget)

    assert sum(count for _, count in chosen) == budget


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
    row.work = work = Pass(draft=draft)
    for flags in halted:
        assert not row.answered
        work.step += 1
        work.note_halted(work.step, flags)

    assert row.answered
    assert [work.steps_taken(place) for place in range(1 + len(draft))] == steps_taken


def test_places_that_have_not_halted_have_taken_every_step():
    row = make_row(steps=5)
    row.work = work = Pass(5, [7, 8])

    assert row.answered
    assert [work.steps_taken(place) for place in range(3)] == [5, 5, 5]


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
    row.work = Pass(step, halted_at=halted_at) if thinking else None

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
    row.taken.passes, row.taken.pass_steps = passes, pass_steps

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
        row.work = Pass()
    assert slots_of(scheduler.thinking()) == [0, 1, 2]
    assert scheduler.answered() == []
    for row in rows[:2]:
        row.work = Pass(row.steps)
    assert scheduler.thinking() == rows[2:]
    assert scheduler.answered() == rows[:2]


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
    busy.work, scheduler.clock = Pass(), 1

    assert scheduler.feeding() == [halting]


@pytest.mark.parametrize(("taken", "pace"), [([3, 3], 3), ([3, 4, 2, 3], 3), ([1, 1], 1), ([1, 2, 2], 2)], ids=str)
def test_rows_that_halt_gather_at_their_mean_pace(taken, pace):
    scheduler = Scheduler(max_rows=2, max_queue=0)
    busy, halting = make_row(1, steps=16), make_row(1, steps=16, halt_tolerance=0.1)
    admit(scheduler, busy, halting)
    halting.taken.passes, halting.taken.pass_steps = len(taken), sum(taken)
    busy.work = Pass()
    begun = []
    for scheduler.clock in range(1, 13):
        begun += [scheduler.clock] if scheduler.feeding() == [halting] else []

    assert begun == list(range(pace, 13, pace))


def test_effort_zero_does_not_wait():
    scheduler = Scheduler(max_rows=2, max_queue=0)
    busy, row = make_row(1, steps=4), make_row(1, steps=0)
    admit(scheduler, busy, row)
    busy.work, scheduler.clock = Pass(), 3

    assert scheduler.feeding() == [row]
    row.work = Pass()
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
    busy.work, scheduler.clock = Pass(), 3

    assert scheduler.feeding() == []
    assert scheduler.clock == 3


# Many operations


DECODERS = pytest.mark.parametrize(
    "decoders", [[CONTEXT], [STATE], [CONTEXT, OTHER, STATE]], ids=["any depth", "depth matters", "several decoders"]
)


def some_row(rng: random.Random, decoders: Sequence[Hosted]) -> Row:
    """A prompt of few different tokens: many begin alike, some are equal, some continue another's reply."""
    prompt = [rng.randrange(2) for _ in range(rng.randint(1, 4))] + [0] * rng.randint(0, 5)
    halting = {"halt_threshold": 0.5} if rng.random() < 0.2 else {}
    steps, decoder = rng.randrange(4), rng.choice(decoders)
    return make_row(prompt, steps, decoder, max_tokens=rng.randint(1, 6), **halting)


@DECODERS
@pytest.mark.parametrize("max_rows", [1, 3, 8])
@pytest.mark.parametrize("max_queue", [0, 5])
def test_no_slot_leaks_in_ten_thousand_operations(max_rows, max_queue, decoders):
    """Against a model that keeps nothing but lists, and slots that remember which tokens were put into them."""
    rng = random.Random(f"{max_rows} {max_queue}")
    scheduler = Scheduler(max_rows, max_queue)
    loop = Loop(scheduler, prefill_chunk=2)
    alive: list[Row] = []  # in order of arrival
    reserved: list[int] = []
    finished = accepted = waits = 0
    for _ in range(10_000):
        match rng.randrange(10):
            case 0:
                rows = [some_row(rng, decoders) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
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
                rows = [some_row(rng, decoders) for _ in range(rng.randrange(2))]  # else the place is given back
                scheduler.submit(rows, reserved.pop())
                alive += rows
                accepted += len(rows)
        check(scheduler)
        running = [row for row in alive if row.slot >= 0]
        assert [*running, *scheduler.waiting] == alive, "first come, first served"
        assert len(scheduler.running) + len(scheduler.waiting) == len(alive) == accepted - finished
    assert finished > 250, "the mix of operations must make rows come and go"
    assert loop.copies > 40 / len(decoders)
    assert waits > 20 or max_rows == 1


@DECODERS
@pytest.mark.parametrize("seed", range(5))
def test_every_row_gets_its_turn(seed, decoders):
    """However rows wait for each other's prefixes and for the clock: some row advances in every step."""
    rng = random.Random(seed)
    scheduler = Scheduler(4, 200)
    loop = Loop(scheduler, prefill_chunk=3, seed=seed)
    rows = [some_row(rng, decoders) for _ in range(200)]
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
