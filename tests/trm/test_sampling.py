"""Sampling: a pure function of logits, parameters and the tokens before, and the distribution that it claims to be.

The definition stands in `trm.reference`, and tests by hand are of it; `choose` must always give its best token. Where
only the position matters, the prompt is `range(position)` and the reply is empty.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trm.engine import sampling
from trm.engine.noise import gumbel_noise, stream_key
from trm.engine.penalties import Penalties
from trm.engine.request import Follow, SamplingParams, TokenLogprobs
from trm.engine.sampling import Answer, Ask, Width, likeliest
from trm.errors import BadRequest
from trm.reference import adjusted_scores

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40).map(torch.tensor)
LOGITS_OF_TEN = torch.linspace(-1, 2, 10)


def ask(params: SamplingParams, prompt_ids: Sequence[int], reply: Sequence[int] = (), mask: bytes | None = None) -> Ask:
    """What the engine asks for a row that has got its reply token by token."""
    penalties = Penalties(params, prompt_ids) if params.edits_logits else None
    for token in reply:
        if penalties:
            penalties.take(token)
    return Ask(params, len(prompt_ids) + len(reply), penalties, None if mask is None else Follow(mask))


def choose(logits: Tensor, params: SamplingParams, prompt_ids: Sequence[int], reply: Sequence[int]) -> int:
    """The next token of one row (V,)."""
    [answer] = sampling.choose(logits[None], [ask(params, prompt_ids, reply)])
    return answer.token


def allowed(logits: torch.Tensor, **params: Any) -> set[int]:
    """The tokens that the filters leave, of those that the noise is added to."""
    scores = adjusted_scores(logits, SamplingParams(**({"temperature": 1.0} | params)), range(5), [])
    return set(scores.isfinite().nonzero()[:, 0].tolist())


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


def test_the_neutral_values_of_other_servers_are_ours():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(temperature=1.5, top_p=0) == SamplingParams(temperature=0, top_p=1)


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
    """Top-k, then min-p, then the smallest set of the best that holds top-p of what is left, low ids first."""
    scores = logits.double().numpy() / temperature
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    least = scores[order[0]] + np.log(min_p) if min_p else -math.inf
    left = [token for token in order[: top_k or None] if scores[token] >= least]
    mass = np.cumsum(np.exp(scores[left] - scores[order[0]]))
    limit = top_p * mass[-1]
    enough = 1 + int(np.searchsorted(mass, limit)) if top_p < 1 else len(left)
    on_the_limit = top_p < 1 and (abs(mass - limit) < 1e-4 * mass[-1]).any()  # either way is right

    got = allowed(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    assert order[0] in got, "the best is always left"
    assert got <= set(left)
    assert on_the_limit or got == set(left[:enough])


# The choice: its distribution


@pytest.mark.parametrize("varied", ["seed", "sample_index", "position"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature, varied):
    """Whichever key moves: n samples of one seed are as independent as the positions of one sample."""
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    draws, asks = 4000, []
    for index in range(draws):
        keys = {"seed": 11, "sample_index": 0, "position": 9} | {varied: index}
        params = SamplingParams(temperature=temperature, seed=keys["seed"], sample_index=keys["sample_index"])
        asks.append(ask(params, range(keys["position"])))
    counts = np.bincount([answer.token for answer in sampling.choose(logits.expand(draws, -1), asks)], minlength=4)

    expected = (logits.double() / temperature).softmax(-1).numpy() * draws
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.3, "three degrees of freedom: one chance in a thousand, and the seed is fixed"


# The choice


@PROPERTY
@given(LOGITS)
def test_temperature_zero_takes_the_best_whatever_else_is_asked(logits):
    params = SamplingParams(temperature=0, top_p=0.1, top_k=3, min_p=0.5, seed=9)

    assert logits[choose(logits, params, range(3), [])] == logits.max()
    assert torch.equal(adjusted_scores(logits, params, range(3), []), logits.double())


@PROPERTY
@given(logits=LOGITS, seed=st.integers(0, 2**63 - 1), position=st.integers(0, 10**6), temperature=st.floats(0.01, 2))
def test_choice_is_the_best_adjusted_score(logits, seed, position, temperature):
    """To the bit: one of them alone must not round differently."""
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

    assert adjusted_scores(logits, params, prompt_ids, reply).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert expected[choose(logits, params, prompt_ids, reply)] == pytest.approx(max(expected), rel=1e-6, abs=1e-6)


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
    key = stream_key(seed=3, sample_index=1, position=len(prompt_ids) + len(reply))
    noise = gumbel_noise(torch.tensor([[key]]), torch.arange(8))[0].tolist()
    expected = [(score - max(edited)) / temperature + n for score, n in zip(edited, noise, strict=True)]

    assert adjusted_scores(logits, params, prompt_ids, reply).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize(
    ("params", "expected"),
    [({"top_k": 2}, {0, 2}), ({"min_p": 0.5}, {2}), ({"top_p": 0.7}, {2})],
    ids=str,
)
def test_filters_see_the_penalties(params, expected):
    """Before its bias, token 2 was the worst; before its penalty, token 1 the best."""
    logits = torch.tensor([1.0, 2.0, 0.0])
    params = SamplingParams(temperature=1.0, frequency_penalty=2.0, logit_bias=((2, 2.0),), **params)

    assert set(adjusted_scores(logits, params, (0,), [1, 1]).isfinite().nonzero()[:, 0].tolist()) == expected


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
    """They are read again for the log probabilities."""
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
    likeliest(logits[None], 4)

    assert choose(logits, params, prompt_ids, reply) == first
    assert logits.tolist() == [4.0, -4.0, 2.0, -2.0]
    assert (prompt_ids, reply) == ([0, 1], [2, 2])


# Log probabilities


def token_logprobs(logits: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """What is told of a token that a bias makes certain."""
    params = SamplingParams(logprobs=min(num_top, 20), logit_bias=((token, 100.0),))
    [answer] = sampling.choose(logits[None], [ask(params, (0,))])
    assert answer.token == token
    return TokenLogprobs(answer.logprob, answer.top)


@PROPERTY
@given(logits=LOGITS, data=st.data())
def test_logprobs_are_those_of_the_softmax_best_first(logits, data):
    token, num_top = data.draw(st.integers(0, len(logits) - 1)), data.draw(st.integers(0, min(20, len(logits))))
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


# All rows together against the definition, one by one


SMALL, LARGE = 37, 20_001  # neither is a multiple of a block; in the large one not every token is a candidate
SHAPES = {
    "peaked": lambda noise: noise * 3,
    "flat": lambda noise: noise * 0.01,
    "equal": lambda noise: noise * 0,
    "coarse": lambda noise: (noise * 2).round() / 2,  # as in bfloat16: many ties
    "steep": lambda noise: torch.linspace(300, -300, len(noise)) + noise,
    "one": lambda noise: torch.full_like(noise, -1e30).index_fill(0, torch.tensor(len(noise) - 3), 1.0),
}


def make_logits(shape: str, size: int, seed: int) -> Tensor:
    return SHAPES[shape](torch.randn(size, generator=torch.Generator().manual_seed(seed)))


@st.composite
def rows(draw: st.DrawFn, size: int) -> tuple[Tensor, SamplingParams, list[int], list[int], bytes | None]:
    """Logits of one row and all that its token depends on, everything now and then left out."""
    token = st.integers(0, size - 1)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-300, 0.01, 0.7, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 5, 300, 10**6])),
        top_p=draw(st.sampled_from([1.0, 1.0, 1e-6, 0.5, 0.95, 0.999999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-4, 0.1, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 0.5, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, -2.0, 0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 1.0])),
        logit_bias=tuple(draw(st.lists(st.tuples(token, st.sampled_from([-100.0, 1.5, 100.0])), max_size=3))),
        seed=draw(st.integers(0, 2**63 - 1)),
        sample_index=draw(st.integers(0, 3)),
        logprobs=draw(st.sampled_from([None, 0, 1, 20])),
    )
    logits = make_logits(draw(st.sampled_from(sorted(SHAPES))), size, draw(st.integers(0, 99)))
    prompt_ids, reply = draw(st.lists(token, min_size=1, max_size=9)), draw(st.lists(token, max_size=9))
    mask = draw(st.sampled_from([None, None, "few", "many"]))
    if mask is not None:
        allowed = draw(st.sets(token, min_size=1, max_size=4))
        bits = sum(1 << one for one in (allowed if mask == "few" else set(range(size)) - allowed))
        mask = bits.to_bytes(-(-size // 32) * 4, "little")  # in words of 32 bits, as the library of grammars gives it
    return logits, params, prompt_ids, reply, mask


def answers(batch: Sequence[Any], dtype: torch.dtype = torch.float32) -> list[Answer]:
    return sampling.choose(torch.stack([logits.to(dtype) for logits, *_ in batch]), [ask(*row[1:]) for row in batch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [SMALL, LARGE])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_row_gets_the_token_of_the_definition(size, dtype, data):
    batch = data.draw(st.lists(rows(size), min_size=1, max_size=4))

    got = answers(batch, dtype)

    for (logits, *rest), answer in zip(batch, got, strict=True):
        assert answer.token == int(adjusted_scores(logits.to(dtype), *rest).argmax())
        assert answer.finite


@pytest.mark.parametrize("size", [SMALL, LARGE])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_row_gets_the_same_bits_alone_and_among_others(size, data):
    """P10: token and log probabilities, in any order."""
    batch = data.draw(st.lists(rows(size), min_size=2, max_size=6))
    order = data.draw(st.permutations(range(len(batch))))

    together = dict(zip(order, answers([batch[row] for row in order]), strict=True))

    for row, one in enumerate(batch):
        assert repr(answers([one])) == repr([together[row]]), "repr: what was not asked for is NaN"


@pytest.mark.parametrize("width", Width)
@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"top_p": 0.9, "min_p": 0.05}])
def test_whatever_is_proven_is_right_and_all_is_in_the_end(width, params):
    shapes = ["peaked", "flat", "coarse", "steep"] * 10
    logits = torch.stack([make_logits(shape, LARGE, seed) for seed, shape in enumerate(shapes)])
    asks = [ask(SamplingParams(temperature=1.0, seed=seed, **params), (1,)) for seed in range(len(shapes))]

    got, unproven = sampling._choose(logits, asks, width)

    if width is Width.ALL:
        assert unproven == []
    for row in set(range(len(shapes))) - set(unproven):
        assert got[row].token == int(adjusted_scores(logits[row], asks[row].params, (1,), []).argmax())
    if width is Width.FEW:
        assert len(unproven) < len(shapes), "some are proven at once"


@pytest.mark.parametrize("params", [{}, {"top_p": 0.97}, {"min_p": 1e-4}, {"top_k": 5000}], ids=str)
def test_rows_that_are_not_proven_are_done_again(params):
    """Flat ones: hundreds of tokens are as good as the best, and the right one is nearly always another."""
    logits = torch.stack([make_logits("flat", LARGE, seed) for seed in range(12)])
    asks = [ask(SamplingParams(temperature=1.0, seed=seed, **params), (1,)) for seed in range(12)]
    _, unproven = sampling._choose(logits, asks, Width.FEW)

    got = sampling.choose(logits, asks)

    assert unproven or not params
    for row, answer in enumerate(got):
        assert answer.token == int(adjusted_scores(logits[row], asks[row].params, (1,), []).argmax())


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1e-300, "top_p": 1e-9}], ids=str
)
def test_ties_go_to_the_lowest_id(size, params):
    logits = torch.zeros(3, size)
    logits[1, [5, 6, size - 1]] = 1.0
    logits[2, [size - 1, size - 2]] = 0.5

    got = sampling.choose(logits, [ask(SamplingParams(**params, logprobs=3), (0,))] * 3)

    assert [answer.token for answer in got] == [0, 5, size - 2]
    assert [[token for token, _ in answer.top] for answer in got] == [
        [0, 1, 2],
        [5, 6, size - 1],
        [size - 2, size - 1, 0],
    ]


@pytest.mark.parametrize(
    "params", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.3}, {"frequency_penalty": 2.0}], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_only_allowed_token_is_chosen(size, temperature, params):
    """Wherever it stands, however unlikely it is."""
    logits = torch.linspace(50, -50, size).expand(4, -1)
    places = [0, 1, size // 2, size - 1]
    masks = [(1 << place).to_bytes(size // 8 + 1, "little") for place in places]
    params = SamplingParams(temperature=temperature, **params)

    got = sampling.choose(logits, [ask(params, (1,), [places[row]] * 3, masks[row]) for row in range(4)])

    assert [answer.token for answer in got] == places


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_a_row_that_is_not_finite_is_told_of_and_leaves_the_others_alone(params, size, bad):
    logits = torch.stack([make_logits("peaked", size, seed) for seed in range(5)])
    params = SamplingParams(**params, logprobs=2)
    expected = sampling.choose(logits, [ask(params, (1,))] * 5)
    for row, place in ((0, 0), (1, size - 1), (3, size // 2)):
        logits[row, place] = bad
    logits[3] = bad

    got = sampling.choose(logits, [ask(params, (1,))] * 5)

    assert [answer.finite for answer in got] == [False, False, True, False, True]
    assert [got[2], got[4]] == [expected[2], expected[4]]
    assert all(0 <= answer.token < size for answer in got)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}, {"top_k": 400}, {"min_p": 0.02}], ids=str)
def test_large_vocabularies_are_sampled_by_their_probabilities(params):
    """Ten groups of tokens, of which the blocks and the candidates know nothing."""
    logits, draws = make_logits("peaked", 5000, 0) / 2, 3000
    scores = adjusted_scores(logits, SamplingParams(temperature=0.9, **params), (1,), [])
    probabilities = torch.where(scores.isfinite(), logits.double() / 0.9, -math.inf).softmax(-1)
    group = torch.randperm(5000, generator=torch.Generator().manual_seed(1)) % 10

    counts = torch.zeros(10)
    for seed in range(0, draws, 100):
        asks = [ask(SamplingParams(temperature=0.9, seed=seed + row, **params), (1,)) for row in range(100)]
        for answer in sampling.choose(logits.expand(100, -1), asks):
            assert probabilities[answer.token] > 0
            counts[group[answer.token]] += 1

    expected = torch.zeros(10, dtype=torch.float64).index_add(0, group, probabilities) * draws
    assert ((counts - expected) ** 2 / expected).sum() < 27.9, "nine degrees of freedom: one chance in a thousand"


def test_likeliest_are_those_of_the_answers():
    logits = torch.stack([make_logits(shape, LARGE, 3) for shape in SHAPES])

    found = likeliest(logits, 7)

    told = sampling.choose(logits, [ask(SamplingParams(logprobs=num), (1,)) for num in (7, 0, 3, 7, 7, 1)])
    assert [answer.top for answer in told] == [one[:num] for one, num in zip(found, (7, 0, 3, 7, 7, 1), strict=True)]


def test_penalties_of_a_draft_are_those_of_a_reply():
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.2, logit_bias=((4, 2.0),))
    penalties, ahead = Penalties(params, (1, 2)), Penalties(params, (1, 2))
    for token in (2, 5):
        penalties.take(token)
        ahead.take(token)
    before = [list(column) for column in (penalties.ids, penalties.factors, penalties.less, penalties.bias)]

    behind = penalties.behind((5, 7, 4))

    for token in (5, 7, 4):
        ahead.take(token)
    assert [list(column) for column in (penalties.ids, penalties.factors, penalties.less, penalties.bias)] == before
    assert (behind.ids, behind.factors, behind.less, behind.bias) == (ahead.ids, ahead.factors, ahead.less, ahead.bias)


# Parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 10.1),
        ("repetition_penalty", math.nan),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("logprobs", -1),
        ("logprobs", 21),
        ("halt_threshold", 0.0),
        ("halt_threshold", 1.0),
        ("halt_threshold", math.nan),
        ("halt_tolerance", 0.0),
        ("halt_tolerance", 1.1),
        ("halt_tolerance", math.nan),
        ("seed", -(2**63) - 1),
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


@pytest.mark.parametrize("bias", [100.5, -100.5, math.nan])
def test_a_bias_out_of_range_is_named_among_many(bias):
    many = tuple((token, 1.0) for token in range(300))

    with pytest.raises(BadRequest, match=f"^logit_bias of token 300 is {bias}; it must be at least -100") as caught:
        SamplingParams(logit_bias=(*many, (300, bias)))
    assert caught.value.param == "logit_bias"


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
    ("params", "edits_logits"),
    [
        ({}, False),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 4, "logprobs": 2}, False),
        ({"temperature": 0.5}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"repetition_penalty": 0.9}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"logit_bias": ((0, 1.0),)}, True),
        ({"logit_bias": ((0, 1.0),), "temperature": 1.0}, True),
    ],
    ids=str,
)
def test_penalties_and_biases_edit_logits(params, edits_logits):
    assert SamplingParams(**params).edits_logits is edits_logits


@pytest.mark.parametrize(
    ("params", "halts"), [({}, False), ({"halt_threshold": 0.5}, True), ({"halt_tolerance": 0.1}, True)], ids=str
)
def test_either_limit_makes_tokens_halt(params, halts):
    assert SamplingParams(**params).halts is halts
