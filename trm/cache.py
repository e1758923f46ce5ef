"""Key/value storage for generate(): the backbone's layers first, then the recursion's entries."""

import inspect
from collections.abc import Callable

from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer

from trm.errors import BadRequest
from trm.layers import KeyValue

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the argument that carries the cache: from 5.24 on, and before."""

CACHE_NAME = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
"""What the installed version calls it, in `generate()` and in the layers of its models."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that a caller gave, by either of its names. Raises BadRequest for two."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise BadRequest(
            "cache and past_key_values are two names of one argument; give only one of them", param="cache"
        )
    return past_key_values if cache is None else cache


def grow(cache: Cache, num_layers: int) -> None:
    """Let `cache` hold at least `num_layers` entries; a deeper effort than the configured one needs more."""
    while len(cache.layers) < num_layers:
        cache.layers.append(DynamicLayer())


def entry_writer(cache: Cache | None, first_entry: int) -> Callable[[int, Tensor, Tensor], KeyValue]:
    """A function that appends keys and values to entry `first_entry + entry` and returns the whole entry.

    Without a cache, keys and values are those of this call alone.
    """

    def write(entry: int, keys: Tensor, values: Tensor) -> KeyValue:
        if cache is None:
            return keys, values
        return cache.update(keys, values, first_entry + entry)  # type: ignore[no-any-return]

    return write
