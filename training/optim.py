"""Optimisers and the learning-rate schedule: which parameter is updated by what, and how fast."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from training.config import OptimizerName

ADAMW_BETAS = (0.9, 0.95)
MUON_ADAMW_RATIO = 0.5  # AdamW's rate beside Muon's, for embeddings, norms, biases and heads


def learning_rate_scale(step: int, total: int, warmup: int) -> float:
    """Factor on the peak rate at optimiser step `step` of `total`: linear warm-up, then a cosine down to 0.

    Steps are optimiser steps really taken: with one per supervision step, `total` counts each of them.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def warmup_steps(wanted: int | None, total: int) -> int:
    """Optimiser steps of linear warm-up: as many as asked for, else a tenth of the run, at most 2000."""
    return min(2000, total // 10) if wanted is None else wanted


def make_optimizers(
    parameters: Iterable[tuple[str, nn.Parameter]], name: OptimizerName, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Optimisers over the named parameters that require gradients.

    `muon` orthogonalises the updates of hidden matrices; whatever is no matrix, or maps to
    or from the vocabulary or a single score, or weighs states, goes to AdamW at half the rate. Weight decay
    spares vectors.
    """
    trainable = [(n, p) for n, p in parameters if p.requires_grad]
    matrices = [p for n, p in trainable if name == "muon" and p.ndim == 2 and not _is_no_hidden_matrix(n)]
    taken = {id(p) for p in matrices}
    rest = [p for _, p in trainable if id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay))
    if rest:
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        rate = lr * (MUON_ADAMW_RATIO if name == "muon" else 1.0)
        optimizers.append(torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=ADAMW_BETAS))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], scale: float) -> None:
    """Give every group its peak rate times `scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def _is_no_hidden_matrix(name: str) -> bool:
    return any(part in name for part in ("embed_tokens", "lm_head", "halt_head", "context_mix"))


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every state tensor of the optimisers, under names that `load_optimizer_tensors` understands."""
    return {
        f"optimizer.{number}.{index}.{key}": value
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    for number, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".", 3)
                states.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


class EMA:
    """Exponential moving average of float32 parameters, with a decay that grows from 0.1 to 0.999.

    After t updates the decay is min(0.999, (1 + t) / (10 + t)).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the parameters; `step` counts from 1."""
        decay = min(0.999, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - decay)
