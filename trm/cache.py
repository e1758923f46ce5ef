"""Key/value storage for generate(): the backbone's layers first, then the recursion's entries."""

import inspect

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer

from trm.errors import BadRequest
from trm.layers import KeyValue, attend

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the argument that carries the cache: from 5.24 on, and before."""

CACHE_NAME = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
"""What the installed version calls it, in `generate()` and in the layers of its models."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that a caller gave, by either of its names. Raises BadRequest for two, and for one of fixed length."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise BadRequest(
            "cache and past_key_values are two names of one argument; give only one of them", param="cache"
        )
    given = past_key_values if cache is None else cache
    if given is not None and not all(isinstance(layer, DynamicLayer) for layer in given.layers):
        raise BadRequest(f"the cache is a {type(given).__name__}; this model needs a DynamicCache", param="cache")
    return given


def grow(cache: Cache, num_layers: int) -> None:
    """Let `cache` hold at least `num_layers` entries; a deeper effort than the configured one needs more."""
    while len(cache.layers) < num_layers:
        cache.layers.append(DynamicLayer())


class Sequences:
    """Keys and values of whole sequences: the `KeyValues` of `forward` and of training.

    mask (B, 1, Q, S): what each query may see, as `attend` takes it. With transformers' cache, entry 0 lies in its
    entry `first_entry`, behind what is there; without, keys and values are those that were written here. Of these
    only the newest entry stays, all that a pass through layers reads, unless `keep`: the context's are read again.
    """

    def __init__(self, mask: Tensor, cache: Cache | None = None, first_entry: int = 0, keep: bool = False) -> None:
        self.mask = mask
        self._cache = cache
        self._first_entry = first_entry
        self._keep = keep
        self._entries: dict[int, KeyValue] = {}

    def write(self, entry: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values (B, S, K, d), or append them to the cache."""
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if keys.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # as `attend` wants them: once, not per call
            keys, values = keys.float(), values.float()
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, self._first_entry + entry)
        if not self._keep:
            self._entries.clear()
        self._entries[entry] = keys, values

    def attend(self, entry: int, queries: Tensor) -> Tensor:
        """What queries (B, Q, H, d) read from an entry: (B, Q, H, d)."""
        return attend(queries.transpose(1, 2), *self._entries[entry], self.mask).transpose(1, 2)

    def seen_by(self, mask: Tensor) -> "Sequences":
        """The same keys and values for other queries."""
        other = Sequences(mask, self._cache, self._first_entry, self._keep)
        other._entries = self._entries
        return other
