"""One of the decoders that share an engine's backbone, as its requests choose it, and what is its own.

Touches no tensors: the scheduler tells decoders apart and asks no more of them.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from trm.chat import ChatFormat
from trm.engine.drafting import Drafter


@dataclass(eq=False)
class Hosted:
    """A decoder on the engine's backbone.

    model: a `TRMForCausalLM`, whose backbone all share. max_supervision: the most steps that a request may ask for.
    exact: whether its replies are the same to the bit in any company. loaded_at: unix time. closed: it takes no new
    requests, and nothing of those that it has is kept.
    """

    model: Any
    chat: ChatFormat
    max_supervision: int
    exact: bool = False
    drafter: Drafter | None = None
    loaded_at: int = field(default_factory=lambda: int(time.time()))
    closed: bool = False

    @property
    def depth_matters(self) -> bool:
        """Whether keys and values depend on the effort, so that a prefix serves no deeper row."""
        return bool(self.model.config.kv_source == "state")

    def entries(self, steps: int | None = None) -> int:
        """Entries of the cache that the recursion uses at an effort; None for the deepest."""
        return int(self.model.config.cache_entries(self.max_supervision if steps is None else steps))
