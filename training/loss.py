"""What one batch costs: the recursion over answer positions, and its loss per supervision step.

Legend: B rows, S positions, A answer positions of the longest row, D hidden, M labels in the batch,
N supervision steps.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.batches import IGNORE_INDEX, Batch
from trm.layers import Attending, Rope, causal_mask, signed
from trm.model import TRMForCausalLM

StepWeights = Literal["uniform", "linear", "last"]


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


def encode(model: TRMForCausalLM, batch: Batch) -> tuple[Tensor, Rope]:
    """The frozen backbone's states x (B, S, D) and the rope of their positions."""
    return model.encode(batch.input_ids, causal_mask(batch.attention_mask, batch.input_ids.shape[1]), _positions(batch))


@torch.no_grad()
def prepare(model: TRMForCausalLM, batch: Batch, states: Tensor | None = None) -> Prepared:
    """Choose the recursion's queries, on backbone states (B, S, D) that were kept, else computed now.

    With keys from the context no query sees another query's state, so that prompt positions
    need no recursion.
    """
    labelled = batch.labels != IGNORE_INDEX
    length = batch.input_ids.shape[1]
    mask = causal_mask(batch.attention_mask, length)
    if states is None:
        x, rope = encode(model, batch)
    else:
        x = states.to(mask.device, model.decoder.halt_head.weight.dtype)
        rope = signed(*model.backbone.model.rotary_emb(x, _positions(batch)))
    targets = batch.labels[labelled]
    if model.config.kv_source == "state":
        return Prepared(x, rope, x, rope, mask, labelled.nonzero(), targets)
    start, count = labelled.int().argmax(dim=1), labelled.sum(dim=1)
    offsets = torch.arange(batch.num_queries, device=x.device)
    queries = (start[:, None] + offsets).clamp(max=length - 1)  # (B, A); what exceeds a row's count is not read
    rows = torch.arange(len(x), device=x.device)[:, None]
    cos, sin = (part.expand(len(x), -1, -1)[rows, queries] for part in rope)
    answers = (offsets < count[:, None]).nonzero()
    return Prepared(x, rope, x[rows, queries], (cos, sin), mask[:, 0][rows, queries].unsqueeze(1), answers, targets)


def _positions(batch: Batch) -> Tensor:
    return (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)


class TokenLosses(NamedTuple):
    """Each label after one supervision step, (M,): its cross-entropy, whether the argmax hits it, the halting score."""

    cross_entropy: Tensor
    right: Tensor
    halt: Tensor


def token_losses(model: TRMForCausalLM, y: Tensor, prepared: Prepared) -> TokenLosses:
    """Read the answer states y (B, Q, D) at the labelled positions. The halting head is a probe: it does not bend y."""
    answer = y[prepared.answers[:, 0], prepared.answers[:, 1]]
    logits = model.readout(answer).float()
    return TokenLosses(
        F.cross_entropy(logits, prepared.targets, reduction="none"),
        logits.argmax(-1) == prepared.targets,
        model.decoder.halt_logits(answer.detach()).float(),
    )


def halting_targets(cross_entropy: Tensor, right: Tensor, delta: float) -> Tensor:
    """Where a token may halt, (N, M), from all N steps of a batch, both (N, M).

    It may where this step's argmax is right, or where no deeper step lowers its cross-entropy by more than `delta`.
    """
    best_from_here = cross_entropy.flip(0).cummin(0).values.flip(0)
    return right | (best_from_here >= cross_entropy - delta)


def step_weights(kind: StepWeights, num_steps: int) -> Tensor:
    """Weights (N,) of the supervision steps' losses; their sum is 1."""
    steps = torch.arange(1, num_steps + 1)
    raw = {"uniform": torch.ones(num_steps), "linear": steps, "last": steps == num_steps}[kind].float()
    return raw / raw.sum()


def reply_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of an ordinary causal language model over reply tokens; the head runs at those only."""
    # Padding stands on the right, where no real token can see it: causal attention needs no mask.
    hidden = model.model(input_ids=batch.input_ids, use_cache=False)
    labelled = batch.labels != IGNORE_INDEX
    logits = model.lm_head(hidden.last_hidden_state[labelled])
    return F.cross_entropy(logits.float(), batch.labels[labelled])
