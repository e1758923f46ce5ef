"""Cross-entropy through a large head: the logits are made and used a block at a time, never whole.

A label's gradient is a mean of the head's rows, so that it is gathered on the way, in the same pass: with l_v the
logits and t the label,

    loss = softplus(m)     m = logsumexp(l_v, v != t) - l_t     gradient = sigmoid(m) (Σ_{v != t} q_v W_v - W_t)

with q the softmax without t. Nothing cancels where a label is all but certain. A frozen head costs two products of
its size, forward and backward together; a trained one is read out once more in the backward pass.
torch's `linear_cross_entropy` and the Triton kernels at hand fit less: see docs/training.md.

Legend: M labels, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training.batches import IGNORE_INDEX

BLOCKS = {"cpu": (512, 4096), "cuda": (2048, 32768)}  # labels and columns of a block: 8 MB in float32, and 256


def cross_entropy(states: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each label, and whether the largest logit hits it, both (M,); 0 and False where it is IGNORE_INDEX.

    Logits are `states` (M, D) times the rows of `head` (V, D), which may be trained; products are taken in the
    head's type, or autocast's. Of equal logits the first is the largest.
    """
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    labelled = targets != IGNORE_INDEX
    with_gradient = torch.is_grad_enabled() and (states.requires_grad or head.requires_grad)
    found, hits = _CrossEntropy.apply(states[labelled], head, targets[labelled], dtype, with_gradient)
    losses, right = found.new_zeros(len(targets)), torch.zeros_like(labelled)
    losses[labelled], right[labelled] = found, hits
    return losses, right


class _CrossEntropy(torch.autograd.Function):
    """All targets are labels. As in flash attention, the largest logit so far sets the scale of what is added up."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        num_rows, num_columns = BLOCKS["cuda" if states.is_cuda else "cpu"]
        hidden = states.to(dtype)
        pull = torch.empty_like(states, dtype=wide) if with_gradient else None
        margins = states.new_empty(len(states), dtype=wide)
        own = torch.empty_like(margins)  # the label's logit
        right = torch.empty_like(margins, dtype=torch.bool)
        for start in range(0, len(states), num_rows):
            rows = slice(start, start + num_rows)
            h, label = hidden[rows], targets[rows]
            best = margins.new_full((len(h),), -torch.inf)  # of the other logits
            total = torch.zeros_like(best)  # of exp(logit - best) over them
            pulled = torch.zeros_like(h, dtype=wide)
            for first in range(0, len(head), num_columns):
                weight = head[first : first + num_columns].to(dtype)
                logits = (h @ weight.t()).to(wide)
                here = ((label >= first) & (label < first + len(weight))).nonzero()[:, 0]
                columns = label[here] - first
                found = logits[here]
                own[rows][here] = found.gather(1, columns[:, None])[:, 0]
                is_first = (found.argmax(1) == columns) & (own[rows][here] > best[here])
                logits[here, columns] = -torch.inf
                largest = logits.amax(1)
                right[rows] &= own[rows] >= largest
                right[rows][here] = is_first
                before, best = best, torch.maximum(best, largest)
                shrink = (before - best).exp_()
                weights = logits.sub_(best[:, None]).exp_()
                total = total * shrink + weights.sum(1)
                if pull is not None:
                    pulled.mul_(shrink[:, None]).add_(weights.to(dtype) @ weight)
            margins[rows] = best + total.log() - own[rows]
            if pull is not None:
                wrong = margins[rows].sigmoid()  # the probability of all other tokens
                pull[rows] = pulled.div_(total[:, None]).sub_(head[label].to(dtype)).mul_(wrong[:, None])
        losses = F.softplus(margins, threshold=40)  # beyond it, the margin itself: 1e-17 less
        if with_gradient:
            trained = ctx.needs_input_grad[1]
            ctx.save_for_backward(pull, *((hidden, head, targets, losses + own) if trained else ()))
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        scale = gradients[0][:, None]
        pull, *rest = ctx.saved_tensors
        return pull * scale, _head_gradient(scale, *rest) if rest else None, None, None, None


def _head_gradient(scale: Tensor, hidden: Tensor, head: Tensor, targets: Tensor, logsumexp: Tensor) -> Tensor:
    """Σ over labels of scale · (softmax - onehot) ⊗ hidden, (V, D), a block of columns after the other."""
    num_rows, num_columns = BLOCKS["cuda" if hidden.is_cuda else "cpu"]
    gradient = torch.zeros_like(head)
    for first in range(0, len(head), num_columns):
        weight = head[first : first + num_columns].to(hidden.dtype)
        for start in range(0, len(hidden), num_rows):
            rows = slice(start, start + num_rows)
            h, label = hidden[rows], targets[rows]
            softmax = ((h @ weight.t()).to(scale.dtype) - logsumexp[rows, None]).exp_()
            here = ((label >= first) & (label < first + len(weight))).nonzero()[:, 0]
            softmax[here, label[here] - first] -= 1
            gradient[first : first + num_columns] += softmax.mul_(scale[rows]).to(hidden.dtype).t() @ h
    return gradient
