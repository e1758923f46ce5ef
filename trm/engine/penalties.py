"""By how much the logits of one request's tokens change with what its prompt and reply say. Touches no tensors."""

from array import array
from collections.abc import Sequence
from copy import copy

from trm.engine.request import SamplingParams


class Penalties:
    """The tokens whose logits change, each once, and how; kept up token by token.

    In this order: a logit above zero is divided by `factors`, another one multiplied; then `less` is taken off it,
    and `bias` added.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        seen = dict.fromkeys(prompt_ids) if params.repetition_penalty != 1 else {}
        self.ids = array("q", seen)
        self.factors = array("d", [params.repetition_penalty]) * len(seen)
        self.less = array("d", [0.0]) * len(seen)
        self.bias = self.less[:]
        self._params = params
        self._grows = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        self._at = {token: place for place, token in enumerate(seen)}  # of each token, where it stands
        self._counts: dict[int, int] = {}  # in the reply
        for token, bias in params.logit_bias:
            self.bias[self._place(token)] += bias

    def take(self, token: int) -> None:
        """Add a token to the reply."""
        if not self._grows:
            return
        place, count = self._place(token), self._counts.get(token, 0) + 1
        self._counts[token] = count
        self.factors[place] = self._params.repetition_penalty
        self.less[place] = self._params.presence_penalty + self._params.frequency_penalty * count

    def behind(self, draft: Sequence[int]) -> "Penalties":
        """Those of the reply with `draft` behind it."""
        if not draft:
            return self
        new = copy(self)
        new.ids, new.factors, new.less, new.bias = self.ids[:], self.factors[:], self.less[:], self.bias[:]
        new._at, new._counts = self._at.copy(), self._counts.copy()
        for token in draft:
            new.take(token)
        return new

    def _place(self, token: int) -> int:
        place = self._at.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.factors.append(1.0)
            self.less.append(0.0)
            self.bias.append(0.0)
        return place
