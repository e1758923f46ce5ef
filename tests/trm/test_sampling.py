"""Sampling: a pure function of logits, parameters and the tokens before, and the distribution that it claims to be.

Where only the position matters, the prompt is `range(position)` and the reply is empty.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trm.engine.request import SamplingParams
from trm.engine.sampling import adjusted_scores, choose, gumbel_noise, token_logprobs
from trm.errors import BadRequest

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40).map(torch.tensor)
LOGITS_OF_TEN = torch.linspace(-1, 2, 10)


def allowed(logits: torch.Tensor, **params: Any) -> set[int]:
    """The tokens that the filters leave, of those that the noise is added to."""
    scores = adjusted_scores(logits, SamplingParams(**({"temperature": 1.0} | params)), range(5), [])
    return set(np.flatnonzero(np.isfinite(scores)).tolist())


# The filters


def test_filters_off_leave_every_token():
    assert allowed(LOGITS_OF_TEN) == set(range(10))
    assert allowed(LOGITS_OF_TEN, top_k=10) == set(range(10))
    assert allowed(LOGITS_OF_TEN, top_k=1000) == set(range(10))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.49}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.79}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.59}, {0, 1}),
        ({"min_p": 0.61}, {0}),
        ({"min_p": 0.41}, {0, 1}),
        ({"top_k": 2, "top_p": 0.6}, {0}),  # of the two that are left, the first has 5 parts in 8
        ({"top_k": 2, "top_p": 0.7}, {0, 1}),
        ({"min_p": 0.5, "top_p": 0.6}, {0}),
        ({"temperature": 0.5, "min_p": 0.37}, {0}),  # 0.09 / 0.25 after the temperature
        ({"temperature": 2.0, "min_p": 0.75}, {0, 1}),
    ],
    ids=str,
)
def test_filters_by_hand(params, expected):
    logits = torch.tensor([0.5, 0.3, 0.2]).log()

    assert allowed(logits, **params) == expected


def test_top_p_that_is_met_exactly_needs_no_more_tokens():
    assert allowed(torch.zeros(4), top_p=0.5) == {0, 1}
    assert allowed(torch.zeros(4), top_p=0.51) == {0, 1, 2}


@PROPERTY
@given(
    logits=LOGITS,
    temperature=st.floats(0.05, 2),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filters_equal_their_definition(logits, temperature, top_k, top_p, min_p):
    """Top-k, then min-p, then the smallest set of the best that holds top-p of what is left; ties may stay together."""
    scores = logits.double().numpy() / temperature
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    least = scores[order[min(top_k, len(order)) - 1]] if top_k else -math.inf
    left = [
        token
        for token in order
        if scores[token] >= max(least, scores[order[0]] + np.log(min_p) if min_p else -math.inf)
    ]
    mass = np.cumsum(np.exp(scores[left] - scores[order[0]]))
    limit = top_p * mass[-1]
    enough = 1 + int(np.searchsorted(mass, limit)) if top_p < 1 else len(left)
    on_the_limit = top_p < 1 and (abs(mass - limit) < 1e-9 * mass[-1]).any()  # either way is right

    got = allowed(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    assert max(scores) in scores[list(got)], "the best is always left"
    assert got <= set(left)
    kept = sorted((scores[token] for token in got), reverse=True)
    assert on_the_limit or kept == [scores[token] for token in left[:enough]]


# The noise


def test_noise_is_pinned():
    """A change of generator or of its key would silently change every seeded reply."""
    expected = [-1.0143768629196024, 1.061284918024118, -0.24819978767576154, 0.4722612832229541]

    assert gumbel_noise(4, seed=1, sample_index=2, position=3) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "other",
    [{"seed": 8}, {"sample_index": 1}, {"position": 6}, {"seed": 2**63 - 1}, {"seed": 0, "sample_index": 7}],
    ids=str,
)
def test_noise_depends_on_each_of_its_keys(other):
    keys = {"seed": 7, "sample_index": 0, "position": 5}

    first, second = gumbel_noise(1000, **keys), gumbel_noise(1000, **(keys | other))

    assert not np.isin(first, second).any(), "streams must not even overlap"


def test_noise_of_neighbouring_positions_never_overlaps():
    """A counter in the low words would make position 1 repeat position 0 shifted by four."""
    streams = [gumbel_noise(200, seed=1, sample_index=0, position=position) for position in range(50)]

    assert len(np.unique(np.concatenate(streams))) == 50 * 200


def test_noise_is_stateless():
    torch.manual_seed(0)
    np.random.seed(0)
    first = gumbel_noise(100, 1, 2, 3)
    torch.rand(5)
    np.random.rand(5)
    gumbel_noise(7, 3, 2, 1)

    assert np.array_equal(first, gumbel_noise(100, 1, 2, 3))
    assert np.array_equal(first[:10], gumbel_noise(10, 1, 2, 3)), "a larger vocabulary extends it"


def test_noise_is_gumbel():
    noise = gumbel_noise(200_000, seed=3, sample_index=0, position=0)

    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)


@pytest.mark.parametrize("varied", ["seed", "sample_index", "position"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature, varied):
    """Whichever key moves: n samples of one seed are as independent as the positions of one sample."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    draws = 4000
    counts = np.zeros(4)
    for index in range(draws):
        keys = {"seed": 11, "sample_index": 0, "position": 9} | {varied: index}
        params = SamplingParams(temperature=temperature, seed=keys["seed"], sample_index=keys["sample_index"])
        counts[choose(logits, params, range(keys["position"]), [])] += 1

    expected = (logits.double() / temperature).softmax(-1).numpy() * draws
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.3, "three degrees of freedom: one chance in a thousand, and the seed is fixed"


# The choice


@PROPERTY
@given(LOGITS)
def test_temperature_zero_takes_the_best_whatever_else_is_asked(logits):
    params = SamplingParams(temperature=0, top_p=0.1, top_k=3, min_p=0.5, seed=9)

    assert logits[choose(logits, params, range(3), [])] == logits.max()
    assert np.array_equal(adjusted_scores(logits, params, range(3), []), logits.double().numpy())


@PROPERTY
@given(logits=LOGITS, seed=st.integers(0, 2**63 - 1), position=st.integers(0, 10**6), temperature=st.floats(0.01, 2))
def test_choice_is_the_best_adjusted_score(logits, seed, position, temperature):
    """The reference and the engine meet here: one of them alone must not round differently."""
    params = SamplingParams(temperature=temperature, seed=seed, top_p=0.9)

    assert choose(logits, params, range(position), []) == int(
        adjusted_scores(logits, params, range(position), []).argmax()
    )
    assert choose(logits, params, range(position), []) == choose(logits.clone(), params, range(position), [])


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-100, 1e-30])
def test_tiny_temperature_is_greedy(temperature):
    """Dividing by it overflows, and of several infinite scores the first would win."""
    logits = torch.tensor([1.0, 3.0, -2.0, 2.999])

    assert all(
        choose(logits, SamplingParams(temperature=temperature, seed=seed), range(4), []) == 1 for seed in range(20)
    )
    assert choose(logits, SamplingParams(temperature=temperature, top_p=0.5, min_p=0.1), range(4), []) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_any_type(temperature, dtype):
    assert (
        choose(torch.tensor([0.0, 50.0, 1.0], dtype=dtype), SamplingParams(temperature=temperature), range(0), []) == 1
    )


def test_filtered_tokens_are_never_chosen():
    params = [SamplingParams(temperature=2.0, top_k=2, seed=seed) for seed in range(300)]

    assert {choose(LOGITS_OF_TEN, p, range(0), []) for p in params} == {8, 9}


@PROPERTY
@given(logits=LOGITS, split=st.integers(0, 7), seed=st.integers(0, 2**63 - 1))
def test_where_the_reply_begins_does_not_matter_without_penalties(logits, split, seed):
    """A preempted or continued reply may come back as part of a prompt."""
    params, ids = SamplingParams(temperature=1.5, seed=seed), range(7)

    assert choose(logits, params, ids[:split], ids[split:]) == choose(logits, params, ids, [])


# Penalties and bias


def slow_scores(
    logits: Sequence[float], params: SamplingParams, prompt_ids: Sequence[int], reply: Sequence[int]
) -> list[float]:
    """The definition: the logits as they are changed before temperature and filters, token by token."""
    scores = []
    for token, logit in enumerate(logits):
        score = logit
        if token in prompt_ids or token in reply:
            score = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
        if token in reply:
            score -= params.presence_penalty
        for other in reply:
            if other == token:
                score -= params.frequency_penalty
        for biased, bias in params.logit_bias:
            if biased == token:
                score += bias
        scores.append(score)
    return scores


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [4.0, -4.0, 2.0, -2.0, 0.0, 1.0]),
        ({"repetition_penalty": 2.0}, [2.0, -8.0, 1.0, -4.0, 0.0, 1.0]),  # in prompt or reply, and away from the best
        ({"repetition_penalty": 0.5}, [8.0, -2.0, 4.0, -1.0, 0.0, 1.0]),
        ({"presence_penalty": 1.5}, [4.0, -4.0, 0.5, -3.5, -1.5, 1.0]),  # in the reply, however often
        ({"presence_penalty": -1.0}, [4.0, -4.0, 3.0, -1.0, 1.0, 1.0]),
        ({"frequency_penalty": 0.5}, [4.0, -4.0, 1.5, -3.5, -0.5, 1.0]),  # in the reply, each time
        ({"frequency_penalty": -2.0}, [4.0, -4.0, 4.0, 4.0, 2.0, 1.0]),
        ({"logit_bias": ((5, 3.5), (0, -100.0))}, [-96.0, -4.0, 2.0, -2.0, 0.0, 4.5]),
        ({"logit_bias": ((5, 1.0), (5, 2.0))}, [4.0, -4.0, 2.0, -2.0, 0.0, 4.0]),
        ({"repetition_penalty": 2.0, "presence_penalty": 1.0}, [2.0, -8.0, 0.0, -5.0, -1.0, 1.0]),
        ({"repetition_penalty": 2.0, "logit_bias": ((0, 3.0), (1, 3.0))}, [5.0, -5.0, 1.0, -4.0, 0.0, 1.0]),
        ({"presence_penalty": 1.0, "frequency_penalty": 1.0}, [4.0, -4.0, 0.0, -6.0, -2.0, 1.0]),
    ],
    ids=str,
)
def test_penalties_by_hand(params, expected):
    """Tokens 0 and 1 stand in the prompt, 2 in both, 3 three times in the reply, 4 once; 5 nowhere."""
    logits = torch.tensor([4.0, -4.0, 2.0, -2.0, 0.0, 1.0])
    prompt_ids, reply = (0, 1, 0, 2), [3, 2, 3, 4, 3]

    assert adjusted_scores(logits, SamplingParams(**params), prompt_ids, reply).tolist() == expected
    assert slow_scores(logits.tolist(), SamplingParams(**params), prompt_ids, reply) == expected


PENALTIES = st.fixed_dictionaries(
    {
        "repetition_penalty": st.just(1.0) | st.floats(0.01, 2),
        "presence_penalty": st.just(0.0) | st.floats(-2, 2),
        "frequency_penalty": st.just(0.0) | st.floats(-2, 2),
        "logit_bias": st.lists(st.tuples(st.integers(0, 7), st.floats(-100, 100)), max_size=4).map(tuple),
    }
)
LOGITS_OF_EIGHT = st.lists(st.floats(-30, 30, width=32), min_size=8, max_size=8).map(torch.tensor)
TOKENS = st.lists(st.integers(0, 7), max_size=12)


@PROPERTY
@given(logits=LOGITS_OF_EIGHT, penalties=PENALTIES, prompt_ids=TOKENS.filter(bool), reply=TOKENS)
def test_penalties_equal_their_definition(logits, penalties, prompt_ids, reply):
    params = SamplingParams(**penalties)
    expected = slow_scores(logits.tolist(), params, prompt_ids, reply)

    assert adjusted_scores(logits, params, prompt_ids, reply) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert expected[choose(logits, params, prompt_ids, reply)] == pytest.approx(max(expected), rel=1e-12, abs=1e-12)


@PROPERTY
@given(
    logits=LOGITS_OF_EIGHT,
    penalties=PENALTIES,
    prompt_ids=TOKENS.filter(bool),
    reply=TOKENS,
    temperature=st.floats(0.05, 2),
)
def test_temperature_and_noise_come_after_the_penalties(logits, penalties, prompt_ids, reply, temperature):
    params = SamplingParams(**penalties, temperature=temperature, seed=3, sample_index=1)
    edited = slow_scores(logits.tolist(), params, prompt_ids, reply)
    noise = gumbel_noise(8, 3, 1, len(prompt_ids) + len(reply))
    expected = [(score - max(edited)) / temperature + n for score, n in zip(edited, noise, strict=True)]

    assert adjusted_scores(logits, params, prompt_ids, reply) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("params", "expected"),
    [({"top_k": 2}, {0, 2}), ({"min_p": 0.5}, {2}), ({"top_p": 0.7}, {2})],
    ids=str,
)
def test_filters_see_the_penalties(params, expected):
    """Before its bias, token 2 was the worst; before its penalty, token 1 the best."""
    logits = torch.tensor([1.0, 2.0, 0.0])
    params = SamplingParams(temperature=1.0, frequency_penalty=2.0, logit_bias=((2, 2.0),), **params)

    assert set(np.flatnonzero(np.isfinite(adjusted_scores(logits, params, (0,), [1, 1])))) == expected


@pytest.mark.parametrize(
    "penalty",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.5},
        {"logit_bias": ((1, -1.5),)},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1e-30], ids=["greedy", "nearly greedy"])
def test_penalties_act_without_temperature_too(temperature, penalty):
    logits = torch.tensor([2.5, 3.0, 0.0])

    assert choose(logits, SamplingParams(temperature=temperature), (2,), [1]) == 1
    assert choose(logits, SamplingParams(temperature=temperature, **penalty), (2,), [1]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_inputs_are_never_changed(temperature, dtype):
    """In float64 the logits share their memory with numpy, and they are read again for the log probabilities."""
    logits = torch.tensor([4.0, -4.0, 2.0, -2.0], dtype=dtype)
    prompt_ids, reply = [0, 1], [2, 2]
    params = SamplingParams(
        temperature=temperature,
        repetition_penalty=2.0,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        logit_bias=((3, 9.0),),
        top_k=2,
        top_p=0.9,
        min_p=0.01,
    )

    first = choose(logits, params, prompt_ids, reply)
    adjusted_scores(logits, params, prompt_ids, reply)
    token_logprobs(logits, 0, 4)

    assert choose(logits, params, prompt_ids, reply) == first
    assert logits.tolist() == [4.0, -4.0, 2.0, -2.0]
    assert (prompt_ids, reply) == ([0, 1], [2, 2])


# Log probabilities


@PROPERTY
@given(logits=LOGITS, data=st.data())
def test_logprobs_are_those_of_the_softmax_best_first(logits, data):
    token, num_top = (data.draw(st.integers(0, len(logits) - 1)) for _ in range(2))
    values = logits.tolist()
    total = math.log(sum(math.exp(value - max(values)) for value in values)) + max(values)

    got = token_logprobs(logits, token, num_top)

    assert got.logprob == pytest.approx(values[token] - total, rel=1e-5, abs=1e-5)
    assert [logprob for _, logprob in got.top] == pytest.approx(
        sorted((value - total for value in values), reverse=True)[:num_top], rel=1e-5, abs=1e-5
    )
    assert all(logprob == token_logprobs(logits, other, 0).logprob for other, logprob in got.top)
    assert len({other for other, _ in got.top}) == num_top


def test_logprobs_without_alternatives():
    assert token_logprobs(torch.zeros(4), 3, 0).top == ()


def test_logprobs_of_the_whole_vocabulary_sum_to_one():
    got = token_logprobs(LOGITS_OF_TEN, 0, 10)

    assert [token for token, _ in got.top] == list(range(9, -1, -1))
    assert sum(math.exp(logprob) for _, logprob in got.top) == pytest.approx(1)
    assert got.logprob == got.top[-1][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_logprobs_are_not_rounded_to_the_type_of_the_logits(dtype):
    """In bfloat16 a probability of 0.99 would have no digits left."""
    got = token_logprobs(torch.tensor([5.0, 0.0], dtype=dtype), 0, 1)

    assert got.logprob == pytest.approx(-math.log1p(math.exp(-5)), rel=1e-4)
    assert got.top == ((0, got.logprob),)


# Parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 2.1),
        ("repetition_penalty", math.nan),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", ((3, 0.0), (4, 100.5))),
        ("logit_bias", ((3, -100.5),)),
        ("logit_bias", ((3, math.nan),)),
        ("logprobs", -1),
        ("logprobs", 21),
        ("halt_threshold", 0.0),
        ("halt_threshold", 1.0),
        ("halt_threshold", math.nan),
        ("halt_tolerance", 0.0),
        ("halt_tolerance", 1.1),
        ("halt_tolerance", math.nan),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused_by_name_and_value(name, value):
    with pytest.raises(BadRequest, match=f"{name} is .*; it must be") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.0),
        ("top_p", 1.0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.1),
        ("repetition_penalty", 2.0),
        ("presence_penalty", -2.0),
        ("presence_penalty", 2.0),
        ("frequency_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("logit_bias", ((3, 100.0), (4, -100.0))),
        ("logprobs", 0),
        ("logprobs", 20),
        ("halt_tolerance", 1.0),
        ("seed", 2**63 - 1),
    ],
    ids=str,
)
def test_limits_themselves_are_allowed(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("params", "edits_logits", "plain_greedy"),
    [
        ({}, False, True),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 4, "logprobs": 2}, False, True),
        ({"temperature": 0.5}, False, False),
        ({"repetition_penalty": 1.1}, True, False),
        ({"repetition_penalty": 0.9}, True, False),
        ({"presence_penalty": -0.1}, True, False),
        ({"frequency_penalty": 0.1}, True, False),
        ({"logit_bias": ((0, 1.0),)}, True, False),
        ({"logit_bias": ((0, 1.0),), "temperature": 1.0}, True, False),
    ],
    ids=str,
)
def test_plain_greedy_is_what_argmax_alone_can_serve(params, edits_logits, plain_greedy):
    params = SamplingParams(**params)

    assert params.edits_logits is edits_logits
    assert params.plain_greedy is plain_greedy


@pytest.mark.parametrize(
    ("params", "halts"), [({}, False), ({"halt_threshold": 0.5}, True), ({"halt_tolerance": 0.1}, True)], ids=str
)
def test_either_limit_makes_tokens_halt(params, halts):
    assert SamplingParams(**params).halts is halts
