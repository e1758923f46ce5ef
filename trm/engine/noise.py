"""The noise of sampled tokens: the same bits on every device, wherever in a tensor a number is computed.

A counter is hashed with a key by integers that wrap (SplitMix64). Logarithms are made of additions, products and
quotients, which IEEE 754 rounds exactly, and never of a library's own.

Every token of a stream has Gumbel noise of its own, minus the logarithm of an exponential variate, its *time*. Times
are drawn block by block: the earliest of BLOCK independent times is exponential with BLOCK times the rate, each token
of the block is as likely to have it, and the others come later by times that are exponential again. So the largest
noise of a block costs one draw, and who looks for the best token need not draw them all.
"""

import functools
import math

import torch
from torch import Tensor

BLOCK = 32  # tokens, a power of two

_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFTS = 30, 27, 31
_TERMS = tuple(2 / odd for odd in (7, 5, 3, 1))  # of 2 atanh
_ROOT_OF_HALF = 0x3FE6A09E667F3BCD  # the bits of a float64


def stream_key(seed: int, sample_index: int, position: int) -> int:
    """What keys the noise of one token, a number of 64 bits with its sign."""
    return _signed(_mixed(_mixed_pair(seed, sample_index) + position * _GOLDEN))


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise (N, C), float64, of tokens `ids` (C,) or (N, C) in the streams of `keys` (N, 1)."""
    later, first = _hashed(keys, torch.stack(torch.broadcast_tensors(ids + 1, ~(ids // BLOCK), keys)[:2]))
    return _noise(first, later, ids % BLOCK)


def noise_of_blocks(keys: Tensor, blocks: Tensor) -> Tensor:
    """The same (N, K, BLOCK) for all tokens of blocks (N, K)."""
    places = torch.arange(BLOCK, device=keys.device)
    later = _hashed(keys[..., None], blocks[..., None] * BLOCK + (places + 1))
    return _noise(_hashed(keys, ~blocks)[..., None], later, places)


def block_noise(keys: Tensor, num_blocks: int) -> Tensor:
    """The largest noise of each block, (N, num_blocks), to the rounding."""
    bits = _hashed(keys, ~torch.arange(num_blocks, device=keys.device))
    return -_log(_exponential(bits) / BLOCK)


def _noise(first: Tensor, later: Tensor, places: Tensor) -> Tensor:
    """Noise of tokens that stand at `places` in their blocks, from the bits of their blocks and their own."""
    delays = _exponential(later).masked_fill_((first & (BLOCK - 1)) == places, 0.0)
    return -_log(delays.add_(_exponential(first) / BLOCK))


def _exponential(bits: Tensor) -> Tensor:
    """Exponential variates from the upper 52 of 64 bits: minus the logarithm of what is strictly between 0 and 1."""
    return -_log(((bits >> 12) & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52))


def _log(values: Tensor) -> Tensor:
    """The natural logarithm of positive, normal float64 values, to a relative 1e-7, also next to 1."""
    bits = values.view(torch.int64)
    exponents = (bits - _ROOT_OF_HALF) >> 52
    mantissas = (bits - (exponents << 52)).view(torch.float64)  # between the root of a half and that of two
    ratio = (mantissas - 1).div_(mantissas + 1)
    square = ratio * ratio
    series = square * _TERMS[0]
    for term in _TERMS[1:-1]:
        series = series.add_(term).mul_(square)
    return series.add_(_TERMS[-1]).mul_(ratio).add_(exponents.double().mul_(math.log(2)))


def _hashed(keys: Tensor, counters: Tensor) -> Tensor:
    """64 bits of each counter under its key, as int64. Sums and products wrap."""
    bits = counters * _signed(_GOLDEN) + keys
    for shift, factor in zip(_SHIFTS, (*_FACTORS, None), strict=True):
        bits ^= (bits >> shift).bitwise_and_(2 ** (64 - shift) - 1)
        if factor is not None:
            bits *= _signed(factor)
    return bits


@functools.lru_cache(maxsize=1024)
def _mixed_pair(seed: int, sample_index: int) -> int:
    return _mixed(_mixed(seed) + sample_index * _GOLDEN)


def _mixed(number: int) -> int:
    """The same hash of one number, of 64 bits without a sign."""
    number = (number + _GOLDEN) & _WORD
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        number = ((number ^ number >> shift) * factor) & _WORD
    return number


def _signed(number: int) -> int:
    """The int64 with the same bits."""
    return number - 2**64 if number >= 2**63 else number
