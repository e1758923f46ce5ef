"""Draft lengths: longer where drafts are right and positions are cheap, none where they cannot pay."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trm.scheduling import CONTEXT, NO_TEXT
from trm.engine.drafting import FIRST_GUESS, MEMORY, PROBE_EVERY, Costs, Drafter
from trm.engine.prefix import Prefix
from trm.engine.request import Event, Request, SamplingParams
from trm.engine.row import Row

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
POSITIONS = (1, 8, 64)
# A call reads every weight, however few its positions: eight cost little more than one, 64 are computed.
REALISTIC = Costs(POSITIONS, backbone_s=(1.0, 1.1, 4.0), step_s=(1.0, 1.1, 4.0), head_s=(0.3, 0.4, 1.0))
PROPORTIONAL = Costs(POSITIONS, backbone_s=POSITIONS, step_s=POSITIONS, head_s=POSITIONS)
FREE = Costs(POSITIONS, backbone_s=(1.0, 1.0, 1.0), step_s=(1.0, 1.0, 1.0), head_s=(0.0, 0.0, 0.0))


def make_row(acceptance: float | None = None, steps: int = 4, max_tokens: int = 100, **params: Any) -> Row:
    row = Row(
        Request((1, 2), SamplingParams(max_tokens=max_tokens, **params)), CONTEXT, steps, ignore, NO_TEXT, Prefix()
    )
    row.acceptance = acceptance
    return row


def ignore(event: Event) -> None:
    """Events are the engine's business."""


def length(rows: Sequence[Row], costs: Costs = REALISTIC, max_tokens: int = 7, num_running: int | None = None) -> int:
    """What a new drafter says."""
    return Drafter(costs, max_tokens).length(rows, len(rows) if num_running is None else num_running)


# Costs


@pytest.mark.parametrize(
    ("num_positions", "seconds"), [(1, 1.0), (2, 1.5), (3, 2.0), (4, 2.5), (5, 3.0), (7, 3.5), (9, 4.0), (109, 29.0)]
)
def test_costs_between_and_beyond_what_was_measured(num_positions, seconds):
    costs = Costs([1, 5, 9], backbone_s=[1.0, 3.0, 4.0], step_s=[10.0, 30.0, 40.0], head_s=[0.1, 0.3, 0.4])

    assert costs.backbone(num_positions) == pytest.approx(seconds)
    assert costs.step(num_positions) == pytest.approx(10 * seconds)
    assert costs.head(num_positions) == pytest.approx(seconds / 10)


@pytest.mark.parametrize("num_positions", [2, 8, 9, 1000])
def test_size_that_was_timed_too_slow_promises_nothing_to_larger_ones(num_positions):
    """A hiccup during the measurement must not make positions pay for themselves."""
    costs = Costs([1, 8], backbone_s=[3.0, 2.0], step_s=[1.0, 0.5], head_s=[1.0, 1.0])

    assert costs.backbone(num_positions) == 3.0
    assert costs.step(num_positions) == 1.0


@pytest.mark.parametrize("seconds", [(3.0, 2.0, 1.0), (3.0, 2.0, 2.5)], ids=str)
def test_costs_never_fall_though_the_measured_ones_do(seconds):
    costs = Costs(POSITIONS, seconds, seconds, seconds)
    steps = [costs.step(count) for count in range(1, 100)]

    assert steps == sorted(steps)


@PROPERTY
@given(
    at=st.lists(st.integers(1, 200), min_size=2, max_size=5, unique=True).map(sorted),
    more=st.lists(st.floats(0, 10), min_size=5, max_size=5),
    wanted=st.integers(1, 300),
)
def test_costs_never_fall_where_the_measured_ones_do_not(at, more, wanted):
    seconds = [1 + sum(more[: i + 1]) for i in range(len(at))]
    costs = Costs(at, backbone_s=seconds, step_s=seconds, head_s=seconds)

    assert costs.step(wanted + 1) >= costs.step(wanted) - 1e-9
    assert all(costs.step(place) == pytest.approx(measured) for place, measured in zip(at, seconds, strict=True))


# The length


def test_draft_is_as_long_as_it_may_be_where_it_is_right_and_positions_cost_nothing():
    assert length([make_row(1.0)], FREE) == 7


@pytest.mark.parametrize(("rooms", "longest"), [((2,), 2), ((7,), 7), ((30,), 7), ((1, 5), 5), ((0, 3, 1), 3)], ids=str)
def test_draft_is_as_long_as_the_longest_row_has_room(rooms, longest):
    """Rows with less room leave the draft earlier."""
    assert length([make_row(1.0, steps=16, max_tokens=room + 1) for room in rooms], FREE) == longest


@pytest.mark.parametrize(
    "row",
    [make_row(1.0, steps=0), make_row(1.0, max_tokens=1)],
    ids=["effort 0: the backbone's choice is the answer", "the next token is the last"],
)
def test_rows_without_room_draft_nothing(row):
    assert length([row], FREE) == 0
    assert length([], FREE) == 0
    assert length([row, make_row(1.0)], FREE) > 0, "but they do not keep others from it"


@pytest.mark.parametrize("acceptance", [0.0, 0.05, 0.1])
def test_drafts_that_are_rarely_right_do_not_pay(acceptance):
    assert length([make_row(acceptance)]) == 0


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("acceptance", [0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_nothing_is_gained_where_a_call_costs_as_much_as_its_positions(steps, acceptance, num_rows):
    assert length([make_row(acceptance, steps)] * num_rows, PROPORTIONAL) == 0


def test_gain_that_is_hardly_one_is_left():
    """k drafts at acceptance 1 and equal costs make (1 + k) tokens of (1 + k) backbone passes and one step."""
    cheap_step = Costs(POSITIONS, backbone_s=(1.0, 1.0, 1.0), step_s=(0.03, 0.03, 0.03), head_s=(0.0, 0.0, 0.0))
    dear_step = Costs(POSITIONS, backbone_s=(1.0, 1.0, 1.0), step_s=(0.10, 0.10, 0.10), head_s=(0.0, 0.0, 0.0))

    assert length([make_row(1.0, steps=1)], cheap_step) == 0, "1.03 / (1 + 0.03 / 8) is less than 1.05"
    assert length([make_row(1.0, steps=1)], dear_step) == 7


def test_better_drafts_are_longer():
    lengths = [length([make_row(acceptance / 20)], max_tokens=15) for acceptance in range(21)]

    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == 15
    assert len(set(lengths)) > 4


def test_more_steps_make_longer_drafts():
    """The backbone's passes are the price, the steps that they save the gain."""
    lengths = [length([make_row(0.7, steps)], max_tokens=15) for steps in (1, 2, 4, 8, 16)]

    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_many_rows_draft_less():
    """Their positions fill the calls already."""
    lengths = [length([make_row(0.7)] * count) for count in (1, 4, 16, 64)]

    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[1]
    assert lengths[-1] == 0


def test_rows_that_only_share_the_steps_count_too():
    assert length([make_row(0.7)], num_running=1) > length([make_row(0.7)], num_running=64) == 0


def test_acceptance_is_the_mean_of_the_rows_that_can_draft():
    """The full row at the end can draft no more, whatever it accepted."""
    mixed = [make_row(0.9), make_row(0.3), make_row(0.0, max_tokens=1)]
    equal = [make_row(0.6), make_row(0.6), make_row(0.6, max_tokens=1)]

    assert length(mixed, FREE, max_tokens=15) == length(equal, FREE, max_tokens=15) > 0


def test_steps_of_rows_that_halt_are_what_they_took():
    early, unknown = (make_row(0.7, steps=16, halt_threshold=0.5) for _ in range(2))
    early.taken.passes, early.taken.pass_steps = 10, 10

    assert length([early]) == length([make_row(0.7, steps=1)])
    assert length([unknown]) == length([make_row(0.7, steps=16)])
    assert length([early]) < length([unknown])


@PROPERTY
@given(
    rows=st.lists(
        st.builds(make_row, st.none() | st.floats(0, 1), steps=st.integers(0, 16), max_tokens=st.integers(1, 12)),
        max_size=20,
    ),
    max_tokens=st.integers(1, 9),
    more_running=st.integers(0, 20),
    costs=st.sampled_from([REALISTIC, FREE, PROPORTIONAL]),
)
def test_length_is_within_the_limit_and_the_room(rows, max_tokens, more_running, costs):
    got = length(rows, costs, max_tokens, len(rows) + more_running)

    assert 0 <= got <= max_tokens
    assert got <= max((row.room_for_draft for row in rows), default=0)


@PROPERTY
@given(
    acceptance=st.floats(0, 1),
    steps=st.integers(1, 16),
    num_rows=st.integers(1, 40),
    more_running=st.integers(0, 40),
    max_tokens=st.integers(1, 9),
)
def test_no_other_length_makes_more_tokens_per_second(acceptance, steps, num_rows, more_running, max_tokens):
    """Against the sentence in the module, spelt out."""

    def tokens_per_s(drafted: int) -> float:
        tokens = 1.0
        for place in range(1, drafted + 1):
            tokens += acceptance**place  # right there and everywhere before
        seconds = 0.0
        for _ in range(drafted + 1):
            seconds += REALISTIC.backbone(num_rows)
        for _ in range(drafted):
            seconds += REALISTIC.head(num_rows)
        for _ in range(steps):
            seconds += REALISTIC.step((num_rows + more_running) * (drafted + 1))
        return tokens / (seconds + REALISTIC.head(num_rows * (drafted + 1)))

    got = length([make_row(acceptance, steps)] * num_rows, REALISTIC, max_tokens, num_rows + more_running)

    best = max(map(tokens_per_s, range(max_tokens + 1)))
    assert tokens_per_s(got) * (1.0501 if got == 0 else 1 + 1e-9) >= best
    assert got == 0 or tokens_per_s(got) > 1.0499 * tokens_per_s(0)


# What is learnt


def test_new_rows_start_from_what_was_seen_of_others():
    drafter, old, new = Drafter(REALISTIC, 7), make_row(), make_row()
    first = drafter.length([new], 1)
    for _ in range(100):
        drafter.learn(old, judged=2, accepted=0)

    assert first == length([make_row(FIRST_GUESS)]) > 0
    assert new.acceptance is None
    assert drafter.length([new], 1) == 0
    drafter.learn(new, judged=1, accepted=1)
    assert new.acceptance == pytest.approx(1 - MEMORY, abs=1e-4), "from there, not from the first guess"


def test_row_is_judged_by_its_own_drafts():
    drafter, good, bad = Drafter(REALISTIC, 7), make_row(), make_row()
    for _ in range(100):
        drafter.learn(good, judged=3, accepted=3)
        drafter.learn(bad, judged=1, accepted=0)

    assert drafter.length([good], 1) == 7
    assert drafter.length([bad], 1) == 0


@pytest.mark.parametrize(
    ("judged", "accepted", "expected"),
    [(0, 0, 0.5), (1, 1, 0.55), (1, 0, 0.45), (2, 2, 0.595), (3, 2, 0.5355)],
)
def test_what_was_seen_counts_a_tenth_each(judged, accepted, expected):
    """The wrong one, if any, comes last: what follows it is not judged."""
    drafter, row = Drafter(REALISTIC, 7), make_row(0.5)
    drafter.acceptance = 0.5

    drafter.learn(row, judged, accepted)

    assert row.acceptance == pytest.approx(expected)
    assert drafter.acceptance == pytest.approx(expected)


def test_nothing_judged_nothing_learnt():
    drafter, row = Drafter(REALISTIC, 7), make_row()

    drafter.learn(row, judged=0, accepted=0)

    assert row.acceptance is None
    assert drafter.acceptance == FIRST_GUESS


@pytest.mark.parametrize("truth", [0.0, 0.5, 1.0])
def test_estimates_move_towards_what_is_seen(truth):
    drafter, row = Drafter(REALISTIC, 7), make_row()
    for _ in range(100):
        drafter.learn(row, judged=1, accepted=1) if truth else None
        drafter.learn(row, judged=1, accepted=0) if truth < 1 else None

    assert row.acceptance == pytest.approx(truth, abs=0.05)
    assert drafter.acceptance == pytest.approx(truth, abs=0.05)


# Probing


def test_row_that_gave_up_drafting_tries_again_now_and_then():
    """Else one bad passage would end drafting for ever: nothing is judged where nothing is drafted."""
    drafter, row = Drafter(REALISTIC, 7), make_row(0.0)

    lengths = [drafter.length([row], 1) for _ in range(5 * PROBE_EVERY)]

    assert lengths == ([0] * (PROBE_EVERY - 1) + [1]) * 5


def test_probes_that_succeed_bring_drafting_back():
    drafter, row = Drafter(REALISTIC, 7), make_row(0.0)
    for _ in range(50 * PROBE_EVERY):
        drafted = drafter.length([row], 1)
        drafter.learn(row, judged=drafted, accepted=drafted)

    assert drafter.length([row], 1) == 7


def test_nobody_probes_while_drafts_are_made():
    drafter, row = Drafter(REALISTIC, 7), make_row(1.0)

    assert {drafter.length([row], 1) for _ in range(3 * PROBE_EVERY)} == {7}


def test_draft_puts_the_next_probe_off():
    drafter, good, bad = Drafter(REALISTIC, 7), make_row(1.0), make_row(0.0)
    for _ in range(PROBE_EVERY - 1):
        drafter.length([bad], 1)
    drafter.length([good], 1)

    assert [drafter.length([bad], 1) for _ in range(PROBE_EVERY)] == [0] * (PROBE_EVERY - 1) + [1]


@pytest.mark.parametrize(
    ("costs", "num_rows"), [(PROPORTIONAL, 1), (REALISTIC, 400)], ids=["dear positions", "many rows"]
)
def test_nobody_probes_what_could_not_pay(costs, num_rows):
    drafter, rows = Drafter(costs, 7), [make_row(0.0) for _ in range(num_rows)]

    assert not any(drafter.length(rows, num_rows) for _ in range(3 * PROBE_EVERY))


def test_nobody_probes_for_rows_without_room():
    drafter, row = Drafter(REALISTIC, 7), make_row(0.0, max_tokens=1)

    assert not any(drafter.length([row], 1) for _ in range(3 * PROBE_EVERY))
