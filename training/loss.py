"""What one batch costs: the recursion over answer positions, and its loss per supervision step.

Legend: B rows, S positions, A answer positions of the longest row, D hidden, M labels in the batch,
N supervision steps, T different targets of them: the last is the answer, which all later steps learn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from training.batches import IGNORE_INDEX, Batch
from training.config import StepWeights
from training.cross_entropy import cross_entropy
from trm.cache import Sequences
from trm.chat import Example
from trm.layers import Rope, causal_mask
from trm.model import TRMForCausalLM


class Vocabulary(NamedTuple):
    """Some of the tokens: their rows of the head (K, D), and the row of each, places (V,), -1 for others."""

    head: Tensor
    places: Tensor


def seen_vocabulary(model: TRMForCausalLM, examples: Sequence[Example]) -> Vocabulary:
    """The tokens that are a label in any example, of any step."""
    head = model.head.weight
    replies = chain.from_iterable((e.ids[e.label_start :], *e.step_replies) for e in examples)
    seen = torch.tensor(sorted(set(chain.from_iterable(replies))), device=head.device)
    places = torch.full((len(head),), -1, device=head.device)
    places[seen] = torch.arange(len(seen), device=head.device)
    return Vocabulary(head.detach()[seen], places)


@dataclass(frozen=True)
class Prepared:
    """A batch after the backbone: what the recursion needs, whatever the number of steps.

    `states` (B, S, C, D), the backbone's, and their `rope` at every position. `x` (B, Q, D), `query_rope` and `mask`
    (B, 1, Q, S) at the recursion's queries: Q = A, the answer positions only, for keys from the
    context, else S. `answers` (M, 2) are the labelled (row, query) pairs, `targets` (T, M) their labels after each
    step, IGNORE_INDEX where a step's is shorter than the answer, and `settled` (T, M) says where halting may begin.
    Labels are rows of `head` (K, D): some of the rows of the model's own, or None for all.
    """

    states: Tensor
    rope: Rope
    x: Tensor
    query_rope: Rope
    mask: Tensor
    answers: Tensor
    targets: Tensor
    settled: Tensor
    head: Tensor | None

    def step_targets(self, step: int) -> tuple[Tensor, Tensor]:
        """`targets` and `settled` (M,) of supervision step `step`, from 0."""
        index = min(step, len(self.targets) - 1)
        return self.targets[index], self.settled[index]

    def key_values(self, model: TRMForCausalLM) -> Sequences:
        """What the queries see: the context's keys and values, projected afresh, with gradient; or each call's own."""
        from_context = model.config.kv_source == "context"
        key_values = Sequences(self.mask, keep=from_context)
        if from_context:
            model.decoder.write_context(self.states, self.rope, key_values)
        return key_values


def encode(model: TRMForCausalLM, batch: Batch) -> tuple[Tensor, Rope]:
    """The frozen backbone's states (B, S, C, D) and the rope of their positions."""
    rope = model.backbone.rope(_positions(batch))
    mask = causal_mask(batch.attention_mask, batch.input_ids.shape[1])
    return model.encode(model.backbone.embed_tokens(batch.input_ids), rope, Sequences(mask)), rope


@torch.no_grad()
def prepare(
    model: TRMForCausalLM, batch: Batch, states: Tensor | None = None, vocabulary: Vocabulary | None = None
) -> Prepared:
    """Choose the recursion's queries, on backbone states (B, S, C, D) that were kept, else computed now.

    Labels are predicted among the tokens of `vocabulary`, else among all.

    With keys from the context no query sees another query's state, so that prompt positions
    need no recursion.
    """
    labelled = batch.labels[-1] != IGNORE_INDEX
    length = batch.input_ids.shape[1]
    mask = causal_mask(batch.attention_mask, length)
    if states is None:
        states, rope = encode(model, batch)
    else:
        states = states.to(mask.device, model.decoder.halt_head.weight.dtype)
        rope = model.backbone.rope(_positions(batch))
    targets, head = batch.labels[:, labelled], None
    settled = settled_labels(targets, labelled.nonzero()[:, 0], len(labelled))
    if vocabulary is not None:
        targets, head = torch.where(targets == IGNORE_INDEX, targets, vocabulary.places[targets]), vocabulary.head
    x = states[:, :, -1]
    if model.config.kv_source == "state":
        return Prepared(states, rope, x, rope, mask, labelled.nonzero(), targets, settled, head)
    start, count = labelled.int().argmax(dim=1), labelled.sum(dim=1)
    offsets = torch.arange(batch.num_queries, device=x.device)
    queries = (start[:, None] + offsets).clamp(max=length - 1)  # (B, A); what exceeds a row's count is not read
    rows = torch.arange(len(x), device=x.device)[:, None]
    cos, sin = (part[rows, queries] for part in rope)
    answers = (offsets < count[:, None]).nonzero()
    seen = mask[:, 0][rows, queries].unsqueeze(1)
    return Prepared(states, rope, x[rows, queries], (cos, sin), seen, answers, targets, settled, head)


def settled_labels(targets: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Where halting may begin, (T, M), from the targets of each step (T, M) and the rows (M,) of the labels.

    At a place where every step learns the answer's token, at once. At the others only after the last step
    that learns something else anywhere in their row.
    """
    differs = targets != targets[-1]
    in_row = targets.new_zeros(len(targets), num_rows).index_add_(1, rows, differs.to(targets.dtype))
    from_here = in_row.flip(0).cumsum(0).flip(0)
    return (from_here[:, rows] == 0) | ~differs.any(0)


def _positions(batch: Batch) -> Tensor:
    return (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)


class TokenLosses(NamedTuple):
    """Each label after one supervision step, (M,): cross-entropy, whether the argmax hits it, halting score, `settled`.

    A label that this step has not got has a cross-entropy of 0 and is never hit.
    """

    cross_entropy: Tensor
    right: Tensor
    halt: Tensor
    settled: Tensor


def token_losses(model: TRMForCausalLM, y: Tensor, prepared: Prepared, step: int) -> TokenLosses:
    """Read the labels from y (B, Q, D) after a step (from 0). The halting head is a probe: it does not bend y.

    Of what lies between y and the heads nothing is kept for the backward pass.
    """

    def heads(y: Tensor) -> tuple[Tensor, Tensor]:
        answer = y[prepared.answers[:, 0], prepared.answers[:, 1]]
        return model.normed(answer), model.decoder.halt_logits(answer.detach())

    targets, settled = prepared.step_targets(step)
    normed, halt = recompute_in_backward(heads, y, use_reentrant=False, preserve_rng_state=False)
    head = model.head.weight if prepared.head is None else prepared.head
    losses, right = cross_entropy(normed, head, targets)
    return TokenLosses(losses, right, halt.float(), settled)


def halting_targets(cross_entropy: Tensor, right: Tensor, delta: float) -> Tensor:
    """Where a token may halt, (N, M), from all N steps of a batch, both (N, M).

    It may where this step's argmax is right, or where no deeper step lowers its cross-entropy by more than `delta`.
    """
    best_from_here = cross_entropy.flip(0).cummin(0).values.flip(0)
    return right | (best_from_here >= cross_entropy - delta)


def paper_step(
    model: TRMForCausalLM, prepared: Prepared, y: Tensor, z: Tensor, step: int
) -> tuple[Tensor, Tensor, TokenLosses]:
    """Supervision step `step` from y and z (B, Q, D); gradient through the last cycle only. Returns them detached."""
    y, z = model.decoder.step(prepared.x, y, z, prepared.query_rope, prepared.key_values(model), grad_cycles=1)
    return y.detach(), z.detach(), token_losses(model, y, prepared, step)


def full_steps(model: TRMForCausalLM, prepared: Prepared, numbers: range) -> Iterator[TokenLosses]:
    """The supervision steps `numbers`, with gradient through all of them; those before, from 0, run without.

    Activations are recomputed in the backward pass: only the states, the losses and their gradient at the states
    of a step are kept.
    """
    key_values = prepared.key_values(model)

    def step(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return model.decoder.step(prepared.x, y, z, prepared.query_rope, key_values)

    y = z = torch.zeros_like(prepared.x)
    with torch.no_grad():
        for _ in range(numbers.start):
            y, z = step(y, z)
    for number in numbers:
        y, z = recompute_in_backward(step, y, z, use_reentrant=False, preserve_rng_state=False)
        yield token_losses(model, y, prepared, number)


class Objective(NamedTuple):
    """The loss to minimise and what it is made of, as sums over the labels of a batch.

    `loss` () has a gradient; `parts` (3, N), cross-entropy, halting loss and hits of each supervision step, has none.
    """

    loss: Tensor
    parts: Tensor


def objective(steps: Sequence[TokenLosses], weights: Tensor, halt_delta: float | None) -> Objective:
    """Add up the supervision steps of a batch, with `weights` (N,). `halt_delta` None: a token may halt where right.

    In either case it must be settled.
    """
    cross_entropy, right, halt, settled = (torch.stack(part) for part in zip(*steps, strict=True))  # each (N, M)
    may_halt = right if halt_delta is None else halting_targets(cross_entropy.detach(), right, halt_delta)
    halting = F.binary_cross_entropy_with_logits(halt, (may_halt & settled).float(), reduction="none")
    loss = (weights.to(halt.device) * cross_entropy.sum(1)).sum() + halting.sum(1).mean()
    return Objective(loss, torch.stack([part.detach().float().sum(1) for part in (cross_entropy, halting, right)]))


def step_weights(kind: StepWeights, num_steps: int) -> Tensor:
    """Weights (N,) of the supervision steps' losses; their sum is 1."""
    steps = torch.arange(1, num_steps + 1)
    raw = {"uniform": torch.ones(num_steps), "linear": steps, "last": steps == num_steps}[kind].float()
    return raw / raw.sum()
