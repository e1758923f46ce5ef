"""Halting: a token that has converged takes fewer steps, each row by its own rule, and says how many."""

import pytest

from tests.trm.engines import Listener, assert_empty, expected, make_engine, request, run
from trm.engine import SamplingParams
from trm.errors import BadRequest

RULES = [
    {"halt_tolerance": 0.5},
    {"halt_tolerance": 0.1},
    {"halt_threshold": 0.5},
    {"halt_threshold": 0.2, "halt_tolerance": 0.2},
]


@pytest.mark.parametrize("draft", [0, 4])
def test_rows_halt_by_their_own_rules_as_if_alone(draft, chat):
    engine = make_engine(chat, "context", draft=draft)
    requests = [
        request(3 + index, n_supervision=4, max_tokens=10, ignore_eos=True, **rule)
        for index, rule in enumerate([*RULES, {}, {"halt_tolerance": 0.3, "temperature": 1.0, "seed": 4}])
    ]

    replies = engine.generate(requests)

    means = set()
    for one, reply in zip(requests, replies, strict=True):
        want = expected(engine, one)
        assert reply.token_ids == want.token_ids
        assert reply.usage.supervision_steps == sum(want.steps)
        means.add(sum(want.steps) / len(want.steps))
    assert max(means) == 4, "the row without a rule went all the way"
    assert any(mean < 4 for mean in means), "some rule was met"
    assert_empty(engine)


def test_tolerance_that_anything_meets_takes_one_step(chat):
    """The answer of step 0 is the backbone's; the first step is compared with it."""
    engine = make_engine(chat)
    for layer in engine.model.decoder.layers:
        assert layer.attention.o_proj.weight.any(), "a model that moves"

    [reply] = engine.generate([request(5, n_supervision=4, max_tokens=6, ignore_eos=True, halt_tolerance=1.0)])

    assert 6 <= reply.usage.supervision_steps < 24


def test_halting_frees_the_row_at_once(chat):
    """Steps that are not taken are not paid for."""
    engine = make_engine(chat)

    [reply] = engine.generate([request(5, n_supervision=4, max_tokens=6, ignore_eos=True, halt_tolerance=0.5)])

    assert engine.stats().row_steps == reply.usage.supervision_steps < 24


def test_effort_bounds_the_steps_of_a_rule_that_is_never_met(chat):
    engine = make_engine(chat)
    one = request(5, n_supervision=3, max_tokens=6, ignore_eos=True)

    [free] = engine.generate([one])
    [bound] = engine.generate(
        [request(5, n_supervision=3, max_tokens=6, ignore_eos=True, halt_tolerance=1e-12, halt_threshold=0.999999)]
    )

    assert bound.token_ids == free.token_ids
    assert bound.usage.supervision_steps == 18


@pytest.mark.parametrize("rule", [{"halt_threshold": 0.5}, {"halt_tolerance": 0.1}], ids=["head", "convergence"])
def test_keys_from_the_state_cannot_halt(rule, chat):
    """A token that stopped early would leave holes in the cache of the deeper calls."""
    engine = make_engine(chat, "state")

    with pytest.raises(BadRequest, match="state") as caught:
        engine.submit([request(3, **rule)])

    assert caught.value.param == next(iter(rule))
    assert_empty(engine)


def test_halting_rows_do_not_disturb_their_neighbours(chat):
    engine = make_engine(chat, max_rows=3)
    listener = Listener(engine)
    plain = [request(length, n_supervision=effort, max_tokens=7) for length, effort in ((4, 2), (6, 4), (9, 1))]
    halting = [request(length, n_supervision=4, max_tokens=7, halt_tolerance=0.3) for length in (5, 7, 11)]
    numbers = listener.submit(*[one for pair in zip(plain, halting, strict=True) for one in pair])
    run(engine)

    for number in numbers:
        assert listener.reply(number).token_ids == expected(engine, listener.handles[number].request).token_ids


def test_rule_that_is_off_is_no_rule():
    assert not SamplingParams().halts
    assert SamplingParams(halt_tolerance=0.1).halts
    assert SamplingParams(halt_threshold=0.1).halts
