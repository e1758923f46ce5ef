"""The plain training loop: no buckets, no kept states, the recursion at every position.

Slow and obvious. It is the control of `training.research.bench` and what the tests hold the trainer's losses to;
nothing else uses it. Gradient goes through all supervision steps, as with `--gradient full`.
Legend as in `training.loss`.
"""

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from training.batches import IGNORE_INDEX, Batch
from training.config import TrainSettings
from training.loss import halting_targets, settled_labels, step_weights
from training.optim import learning_rate_scale, make_optimizers, set_learning_rate
from trm.cache import Sequences
from trm.layers import causal_mask
from trm.model import TRMForCausalLM


def random_order(num_examples: int, batch_size: int, seed: int) -> list[list[int]]:
    """Indices of each batch of one epoch, shuffled, whatever the lengths."""
    indices = list(range(num_examples))
    random.Random(seed).shuffle(indices)
    return [indices[i : i + batch_size] for i in range(0, num_examples, batch_size)]


def train_plainly(
    model: TRMForCausalLM,
    batches: Iterable[Batch],
    settings: TrainSettings,
    total_steps: int,
    warmup_steps: int,
    autocast: bool = False,
) -> Iterator[list[float]]:
    """Train on each batch in turn; yields its cross-entropy per label after every supervision step."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(parameters.items(), settings.optimizer, settings.lr, settings.weight_decay)
    weights = step_weights(settings.step_weights, settings.n_supervision)
    for number, batch in enumerate(batches):
        chosen = [min(step, len(batch.labels) - 1) for step in range(settings.n_supervision)]
        labelled = batch.labels[-1] != IGNORE_INDEX
        targets = batch.labels[:, labelled]
        settled = settled_labels(targets, labelled.nonzero()[:, 0], len(labelled))[chosen]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            cross_entropy, right, scores = _steps(model, batch, labelled, targets[chosen])
        losses = cross_entropy.sum(1) / (targets[chosen] != IGNORE_INDEX).sum(1)
        may_halt = halting_targets(cross_entropy.detach(), right, settings.halt_delta) & settled
        halting = F.binary_cross_entropy_with_logits(scores, may_halt.float())
        ((weights.to(model.device) * losses).sum() + halting).backward()

        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        set_learning_rate(optimizers, learning_rate_scale(number, total_steps, warmup_steps))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield losses.tolist()


def _steps(model: TRMForCausalLM, batch: Batch, labelled: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, whether the argmax hits, and halting score of every label after every step, (N, M) each.

    `labelled` (B, S) says where there are labels, `targets` (N, M) which each step has.
    """
    mask = causal_mask(batch.attention_mask, batch.input_ids.shape[1])
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    rope = model.backbone.rope(positions)
    with torch.no_grad():
        states = model.encode(model.backbone.embed_tokens(batch.input_ids), rope, Sequences(mask))
    key_values = Sequences(mask, keep=model.config.kv_source == "context")
    if model.config.kv_source == "context":
        model.decoder.write_context(states, rope, key_values)

    x = states[..., -1, :]
    y = z = torch.zeros_like(x)
    losses, hits, scores = [], [], []
    for wanted in targets:
        y, z = recompute_in_backward(model.decoder.step, x, y, z, rope, key_values, use_reentrant=False)
        logits = model.readout(y[labelled]).float()
        losses.append(F.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORE_INDEX))
        hits.append(logits.argmax(-1) == wanted)
        scores.append(model.decoder.halt_logits(y[labelled].detach()).float())
    return torch.stack(losses), torch.stack(hits), torch.stack(scores)
