"""Sampling: a pure function of logits, parameters and position, and the distribution that it claims to be."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trm.engine.request import SamplingParams
from trm.engine.sampling import adjusted_scores, choose, gumbel_noise
from trm.errors import BadRequest

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40).map(torch.tensor)
LOGITS_OF_TEN = torch.linspace(-1, 2, 10)


def allowed(logits: torch.Tensor, **params: Any) -> set[int]:
    """The tokens that the filters leave, of those that the noise is added to."""
    scores = adjusted_scores(logits, SamplingParams(**({"temperature": 1.0} | params)), position=5)
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
        counts[choose(logits, params, keys["position"])] += 1

    expected = (logits.double() / temperature).softmax(-1).numpy() * draws
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.3, "three degrees of freedom: one chance in a thousand, and the seed is fixed"


# The choice


@PROPERTY
@given(LOGITS)
def test_temperature_zero_takes_the_best_whatever_else_is_asked(logits):
    params = SamplingParams(temperature=0, top_p=0.1, top_k=3, min_p=0.5, seed=9)

    assert logits[choose(logits, params, 3)] == logits.max()
    assert np.array_equal(adjusted_scores(logits, params, 3), logits.double().numpy())


@PROPERTY
@given(logits=LOGITS, seed=st.integers(0, 2**63 - 1), position=st.integers(0, 10**6), temperature=st.floats(0.01, 2))
def test_choice_is_the_best_adjusted_score(logits, seed, position, temperature):
    """The reference and the engine meet here: one of them alone must not round differently."""
    params = SamplingParams(temperature=temperature, seed=seed, top_p=0.9)

    assert choose(logits, params, position) == int(adjusted_scores(logits, params, position).argmax())
    assert choose(logits, params, position) == choose(logits.clone(), params, position)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-100, 1e-30])
def test_tiny_temperature_is_greedy(temperature):
    """Dividing by it overflows, and of several infinite scores the first would win."""
    logits = torch.tensor([1.0, 3.0, -2.0, 2.999])

    assert all(choose(logits, SamplingParams(temperature=temperature, seed=seed), 4) == 1 for seed in range(20))
    assert choose(logits, SamplingParams(temperature=temperature, top_p=0.5, min_p=0.1), 4) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_any_type(temperature, dtype):
    assert choose(torch.tensor([0.0, 50.0, 1.0], dtype=dtype), SamplingParams(temperature=temperature), 0) == 1


def test_filtered_tokens_are_never_chosen():
    params = [SamplingParams(temperature=2.0, top_k=2, seed=seed) for seed in range(300)]

    assert {choose(LOGITS_OF_TEN, p, 0) for p in params} == {8, 9}


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
