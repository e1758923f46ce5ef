"""What one batch costs: the recursion over answer positions, and its loss per supervision step.

Legend: B rows, S positions, A answer positions of the longest row, D hidden, M labels in the batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.batches import IGNORE_INDEX, Batch
from trm.layers import Attending, Rope, causal_mask
from trm.model import TRMForCausalLM


@dataclass(frozen=True)
class Prepared:
    """A batch after the backbone: what the recursion needs, whatever the number of steps.

    `context` (B, S, D) and its `rope` at every position. `x` (B, Q, D), `query_rope` and `mask`
    (B, 1, Q, S) at the recursion's queries: Q = A, the answer positions only, for keys from the
    context, else S. `answers` (M, 2) are the labelled (row, query) pairs, `targets` (M,) their labels.
    """

    context: Tensor
    rope: Rope
    x: Tensor
    query_rope: Rope
    mask: Tensor
    answers: Tensor
    targets: Tensor

    def attending(self, model: TRMForCausalLM) -> Attending:
        """What the queries see, keys and values projected afresh, with gradient."""
        if model.config.kv_source == "state":
            return Attending(self.query_rope, self.mask, update=lambda entry, keys, values: (keys, values))
        return Attending(self.query_rope, self.mask, model.decoder.context_keys_values(self.context, self.rope))


@torch.no_grad()
def prepare(model: TRMForCausalLM, batch: Batch) -> Prepared:
    """Run the frozen backbone, and choose the recursion's queries.

    With keys from the context no query sees another query's state, so that prompt positions
    need no recursion.
    """
    labelled = batch.labels != IGNORE_INDEX
    length = batch.input_ids.shape[1]
    mask = causal_mask(batch.attention_mask, length)
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    x, rope = model.encode(batch.input_ids, mask, positions)
    targets = batch.labels[labelled]
    if model.config.kv_source == "state":
        return Prepared(x, rope, x, rope, mask, labelled.nonzero(), targets)
    start, count = labelled.int().argmax(dim=1), labelled.sum(dim=1)
    offsets = torch.arange(int(count.max()), device=x.device)
    queries = (start[:, None] + offsets).clamp(max=length - 1)  # (B, A); what exceeds a row's count is not read
    rows = torch.arange(len(x), device=x.device)[:, None]
    cos, sin = (part.expand(len(x), -1, -1)[rows, queries] for part in rope)
    answers = (offsets < count[:, None]).nonzero()
    return Prepared(x, rope, x[rows, queries], (cos, sin), mask[:, 0][rows, queries].unsqueeze(1), answers, targets)


@dataclass(frozen=True)
class StepLoss:
    """Sums over a batch's labels after one supervision step; `right` counts the labels that the argmax hits."""

    cross_entropy: Tensor
    halting: Tensor
    right: Tensor


def step_loss(model: TRMForCausalLM, y: Tensor, prepared: Prepared) -> StepLoss:
    """What one supervision step costs.

    The halting head learns "this step's argmax is right" by binary cross-entropy. It is a probe:
    it reads y and does not bend it.
    """
    answer = y[prepared.answers[:, 0], prepared.answers[:, 1]]
    logits = model.readout(answer).float()
    right = logits.argmax(-1) == prepared.targets
    halt = model.decoder.halt_logits(answer.detach()).float()
    return StepLoss(
        F.cross_entropy(logits, prepared.targets, reduction="sum"),
        F.binary_cross_entropy_with_logits(halt, right.float(), reduction="sum"),
        right.sum(),
    )


def reply_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of an ordinary causal language model over reply tokens; the head runs at those only."""
    # Padding stands on the right, where no real token can see it: causal attention needs no mask.
    hidden = model.model(input_ids=batch.input_ids, use_cache=False)
    labelled = batch.labels != IGNORE_INDEX
    logits = model.lm_head(hidden.last_hidden_state[labelled])
    return F.cross_entropy(logits.float(), batch.labels[labelled])
