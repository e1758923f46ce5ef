"""The weights in training: masters, optimisers, average. One update at a time; saved and put back as tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from training.config import TrainSettings
from training.optim import (
    EMA,
    learning_rate_scale,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    set_learning_rate,
    warmup_steps,
)
from trm import checkpoint
from trm.errors import CheckpointError

MASTER = "master."  # before a parameter's name in a checkpoint


class Weights:
    """The parameters that are trained, by name, and all that an update needs beside their gradients."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: TrainSettings, total_steps: int) -> None:
        self.parameters = parameters
        self.optimizers = make_optimizers(parameters.items(), settings.optimizer, settings.lr, settings.weight_decay)
        self.ema = EMA(parameters)
        self.max_grad_norm = settings.max_grad_norm
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps(settings.warmup_steps, total_steps)

    def clip_gradients(self) -> Tensor:
        """Scale the gradients down to the largest norm allowed; returns the norm that they had."""
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)

    def update(self, step: int) -> float:
        """Update number `step`, from 0: parameters, then average. Returns the factor on the peak learning rate."""
        scale = learning_rate_scale(step, self.total_steps, self.warmup_steps)
        set_learning_rate(self.optimizers, scale)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(step + 1)
        return scale

    def num_bytes(self) -> int:
        """What masters, average and two moments take."""
        return 4 * sum(p.nbytes for p in self.parameters.values())

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` needs beside the averages, by name."""
        return {f"{MASTER}{name}": p for name, p in self.parameters.items()} | optimizer_tensors(self.optimizers)

    def restore(self, tensors: Mapping[str, Tensor], averages: Mapping[str, Tensor], source: str) -> None:
        """Put back what `tensors` gave, and the averages. Raises CheckpointError, naming `source`, where it misfits."""
        masters = {name.removeprefix(MASTER): t for name, t in tensors.items() if name.startswith(MASTER)}
        checkpoint.check_tensors(masters, {name: p.shape for name, p in self.parameters.items()}, source)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(masters[name])
                self.ema.average[name].copy_(averages[name])
        try:
            load_optimizer_tensors(self.optimizers, tensors)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{source}: the optimiser's state does not fit: {error}") from error
