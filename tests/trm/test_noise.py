"""The noise of sampled tokens: a pure function of its keys, Gumbel, and independent whatever key is moved by one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trm.engine.noise import BLOCK, _hashed, _log, block_noise, gumbel_noise, noise_of_blocks, stream_key

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
KEYS = st.integers(0, 2**63 - 1)
PINNED = ["-0x1.5e7cced1f866ap+0", "0x1.72dcd41624f0ap+1", "0x1.318f3d13bc2ddp-4", "0x1.89a9e836cdaafp-1"]
PINNED_KEY = -3576236128402071854
NAMES = ["seed", "sample_index", "position"]


def keys_of(*streams: tuple[int, int, int]) -> Tensor:
    return torch.tensor([[stream_key(*stream)] for stream in streams])


def noise(size: int, seed: int, sample_index: int, position: int) -> Tensor:
    """Of the first tokens, (size,)."""
    return gumbel_noise(keys_of((seed, sample_index, position)), torch.arange(size))[0]


def neighbours(varied: str, count: int, size: int) -> Tensor:
    """Noise (count, size) of streams that differ by one."""
    streams = [{"seed": 11, "sample_index": 0, "position": 9} | {varied: index} for index in range(count)]
    return gumbel_noise(keys_of(*[tuple(stream[name] for name in NAMES) for stream in streams]), torch.arange(size))


def test_noise_is_pinned():
    """A change of hash, key or series would silently change every seeded reply."""
    assert [value.hex() for value in noise(40, seed=1, sample_index=2, position=3)[[0, 1, 2, 39]].tolist()] == PINNED
    assert stream_key(2**63 - 1, 5, 7) == PINNED_KEY


@pytest.mark.parametrize(
    "other",
    [{"seed": 8}, {"sample_index": 1}, {"position": 6}, {"seed": 2**63 - 1}, {"seed": 0, "sample_index": 7}],
    ids=str,
)
def test_noise_depends_on_each_of_its_keys(other):
    keys = {"seed": 7, "sample_index": 0, "position": 5}

    first, second = noise(1000, **keys), noise(1000, **(keys | other))

    assert not torch.isin(first, second).any(), "streams must not even overlap"


@pytest.mark.parametrize("varied", NAMES)
def test_noise_of_neighbouring_streams_never_overlaps(varied):
    assert len(neighbours(varied, 50, 200).unique()) == 50 * 200


@PROPERTY
@given(seed=KEYS, sample_index=st.integers(0, 1000), position=st.integers(0, 10**6), data=st.data())
def test_noise_does_not_depend_on_where_it_is_computed(seed, sample_index, position, data):
    """Alone, or anywhere among others: vector bodies and scalar tails must agree to the bit."""
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 200_000), min_size=1, max_size=70)))
    others = data.draw(st.lists(KEYS, max_size=3))
    key = keys_of((seed, sample_index, position))
    keys = torch.cat([keys_of(*((other, 0, 0) for other in others)), key]) if others else key

    got = gumbel_noise(keys, ids)[-1]

    assert torch.equal(got, torch.cat([gumbel_noise(key, one[None])[0] for one in ids]))
    assert torch.equal(
        got, torch.stack([noise_of_blocks(key, one[None, None] // BLOCK)[0, 0, one % BLOCK] for one in ids])
    )


def test_a_block_is_never_noisier_than_it_says():
    keys = keys_of(*[(seed, 0, 0) for seed in range(20)])

    largest = gumbel_noise(keys, torch.arange(100 * BLOCK)).view(20, 100, BLOCK).amax(dim=-1)

    assert torch.allclose(block_noise(keys, 100), largest, rtol=0, atol=1e-6)


def test_a_larger_vocabulary_extends_it():
    assert torch.equal(noise(1000, 1, 2, 3)[:77], noise(77, 1, 2, 3))


def chi_squared(counts: np.ndarray, expected: np.ndarray | float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def uniform(values: Tensor) -> np.ndarray:
    """What is uniform between 0 and 1 if the values are Gumbel."""
    return np.exp(-np.exp(-values.numpy()))


@pytest.mark.parametrize("varied", ["id", *NAMES])
def test_noise_is_gumbel_whichever_key_moves(varied):
    values = noise(200_000, 3, 0, 0) if varied == "id" else neighbours(varied, 20_000, 10).flatten()

    counts, _ = np.histogram(uniform(values), bins=100, range=(0, 1))

    assert values.isfinite().all()
    assert values.mean() == pytest.approx(0.5772, abs=0.01)
    assert values.var() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert chi_squared(counts, len(values) / 100) < 149, "99 degrees of freedom: one chance in a thousand"


@pytest.mark.parametrize("apart", [1, 2, BLOCK - 1, BLOCK, 1024])
def test_neighbouring_tokens_are_independent(apart):
    values = noise(100_000 + apart, 5, 1, 2)
    assert_independent(values[:-apart], values[apart:])


@pytest.mark.parametrize("varied", NAMES)
@pytest.mark.parametrize("apart", [1, 2, 256])
def test_neighbouring_streams_are_independent(varied, apart):
    values = neighbours(varied, 1000 + apart, 100)
    assert_independent(values[:-apart].flatten(), values[apart:].flatten())


def assert_independent(first: Tensor, second: Tensor) -> None:
    """By the counts of pairs, in ten parts each."""
    counts, _, _ = np.histogram2d(uniform(first), uniform(second), bins=10, range=[(0, 1), (0, 1)])
    assert chi_squared(counts, len(first) / 100) < 149, "99 degrees of freedom: one chance in a thousand"


def test_the_best_of_a_block_is_anywhere_in_it():
    """The block's earliest token is drawn, not found: it must be as likely to be any of them, and be its best."""
    places = noise(32_000 * BLOCK, 1, 1, 1).view(-1, BLOCK).argmax(dim=-1)

    assert chi_squared(places.bincount(minlength=BLOCK).numpy(), 1000) < 62, "31 degrees of freedom"


def test_hash_is_splitmix():
    """Of a key and the first counters it is the published generator, seeded with the key; see Steele, Lea and Flood."""
    state, expected = 1234567, []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = state
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        expected.append(word ^ word >> 31)

    got = _hashed(torch.tensor([[1234567]]), torch.arange(1, 6))[0].tolist()

    assert [value % 2**64 for value in got] == expected
    assert expected[0] == 6457827717110365317


@PROPERTY
@given(st.lists(st.floats(1e-17, 1e3), min_size=1, max_size=20))
def test_logarithm(values):
    ours = _log(torch.tensor(values, dtype=torch.float64)).tolist()

    assert ours == pytest.approx([math.log(value) for value in values], rel=1e-7, abs=1e-300)
