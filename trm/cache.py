"""Key/value storage for generate(): the backbone's layers first, then the recursion's entries."""

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from trm.layers import KeyValue


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
