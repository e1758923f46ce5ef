"""Controls: what the decoder's training compute buys when it is spent on the backbone in an ordinary way.

Three of them, each trained on the decoder's own problems, in its order, with its optimiser, averaging and at least
its floating-point operations: the whole backbone trained on; one ordinary layer more, trained on the frozen backbone;
and low-rank updates (LoRA) of the backbone's matrices with as many weights as the decoder has. Each ends as a plain
directory of the backbone's family that `trm-eval --control` takes, with `control.json` saying what it cost.
"""

import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PreTrainedModel

from training import checkpoints, ordinary, workers
from training.batches import epoch_order
from training.building import backbone_source, build_trainer
from training.checkpoints import RUN_JSON
from training.config import Device, TrainSettings
from training.trainer import Trainer
from training.weights import Weights
from trm import checkpoint
from trm.backbone import Backbone
from trm.chat import Example
from trm.device import use_device
from trm.errors import ConfigError, DeviceError
from trm.logs import configure_logging
from trm.settings import Settings, run_command

logger = logging.getLogger(__name__)

Kind = Literal["continued", "layer", "lora"]
AVERAGE, STEPS, IDENTITY = "average.", "steps", "identity"  # names of tensors in what is put down
SAVE_STEPS = 500  # after so many, what is trained is put down, to go on from
COUNTED_STEPS = 24  # optimiser steps over which operations are counted, of the decoder and of the control
CONTROL_JSON = "control.json"
NAMES: dict[str, str] = {
    "continued": "backbone trained on",
    "layer": "one ordinary layer more",
    "lora": "LoRA on the backbone",
}


class ControlSettings(Settings):
    """Spend a decoder's training compute on its backbone instead."""

    command: ClassVar[str] = "python -m training.research.controls"

    kind: Kind = Field("continued", description="what is trained: all weights, one layer more, or low-rank updates")
    run: Path = Field(
        Path("runs/trm"),
        description="the decoder's run directory: data, order, optimiser, compute; and the runs it began with",
    )
    output_dir: Path = Field(Path("runs/control"), description="where the model goes")
    lr: float | None = Field(None, gt=0, description="peak learning rate; default the decoder's")
    device: Device = Field("auto", description="where to train")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; by default torch chooses")


class LowRank(nn.Module):
    """W + up @ down, with `up` zero at first (Hu et al., 2021)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def train_control(kind: Kind, runs: Sequence[TrainSettings], output_dir: Path, lr: float | None = None) -> Path:
    """Train one control of a decoder to the end, into `output_dir`.

    The decoder was trained in `runs`, one after the other. The control's optimiser is that of the first of them, and
    so is its peak rate unless `lr` is given. The same call goes on where one was interrupted.
    Raises ConfigError where something else is in the way, DeviceError where its gradient is not finite.
    """
    output_dir = Path(os.path.abspath(output_dir))
    if output_dir.exists() and not (output_dir.is_dir() and next(output_dir.iterdir(), None) is None):
        raise ConfigError(f"--output-dir {output_dir}: holds something already; choose another, or remove that")
    run = runs[0]
    device = use_device(run.device, run.num_threads)
    workers.start(device)
    trainers = [
        build_trainer(each.model_copy(update={"cache_states": "off", "init_from": None}), *backbone_source(run), device)
        for each in runs
    ]
    decoder_weights = sum(p.numel() for p in trainers[0].weights.parameters.values())
    decoder_flops = 0.0
    for trainer in trainers:
        trainer.weights.optimizers = []  # an update is no part of what is compared, and each process makes it anew
        with FlopCounterMode(display=False) as counted:
            for _ in range(min(COUNTED_STEPS, trainer.total_steps)):
                trainer.train_step()
                trainer.model.zero_grad()
        depths = [_passes(trainer.supervision_steps(step)) for step in range(trainer.total_steps)]
        # Other depths are drawn later; where those are deeper, all that was counted is taken to grow with them.
        deeper = max(1.0, fmean(depths) / fmean(depths[: trainer.step]))
        decoder_flops += _of_all(counted, device) / trainer.step * trainer.total_steps * deeper
    torch.manual_seed(run.seed)
    trainer = trainers[0]
    model = trainer.model.backbone.to_transformers().to(device)
    trained = add_weights(model, kind, decoder_weights)
    model.set_attn_implementation("eager")  # faster in training on a CPU

    batches = _batches(trainers)
    with FlopCounterMode(display=False) as counted:
        for examples in itertools.islice(_batches(trainers), COUNTED_STEPS):
            ordinary.add_gradients(model, examples, trainer.pad_id)
    model.zero_grad()
    flops_per_step = _of_all(counted, device) / COUNTED_STEPS
    steps = math.ceil(decoder_flops / flops_per_step)
    logger.info("%s: %d steps, the decoder took %d", NAMES[kind], steps, sum(each.total_steps for each in trainers))

    weights = Weights(trained, run.model_copy(update={"lr": lr or run.lr}), steps)
    state = output_dir.with_name(f".{output_dir.name}.safetensors")
    identity = _digest(kind, lr or run.lr, *(checkpoints.identity(each.state()) for each in trainers))
    begun = _restore(weights, state, identity) if state.exists() else 0
    workers.wait()  # until all have read it
    model.train()
    left = itertools.islice(batches, begun, steps)
    progress = tqdm(left, initial=begun, total=steps, desc=kind, unit="step", disable=workers.rank() > 0)
    for step, examples in enumerate(progress, start=begun):
        ordinary.add_gradients(model, examples, trainer.pad_id)
        if not torch.isfinite(weights.clip_gradients()):
            raise DeviceError(f"step {step + 1}: the gradient is not finite; try a lower --lr")
        weights.update(step)
        if (step + 1) % SAVE_STEPS == 0 and workers.rank() == 0:
            _save(weights, step + 1, state, identity)
    if workers.rank() > 0:
        return output_dir
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights.ema.average[name])
    _write(output_dir, model, trainer, {
        "name": NAMES[kind],
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "steps": steps,
        "tflop": steps * flops_per_step / 1e12,
        "decoder_tflop": decoder_flops / 1e12,
        "compute": f"{steps * flops_per_step / 1e12:.3g} TFLOP; the decoder took {decoder_flops / 1e12:.3g}",
    })  # fmt: skip
    state.unlink(missing_ok=True)
    return output_dir


def add_weights(model: PreTrainedModel, kind: Kind, decoder_weights: int) -> dict[str, nn.Parameter]:
    """Make trainable what this control trains, and only that; returns it by name.

    "lora" takes the rank whose number of weights comes closest to `decoder_weights`.
    """
    model.requires_grad_(kind == "continued")
    layers = model.model.layers
    if kind == "layer":
        config = model.config
        if getattr(config, "layer_types", None):
            config.layer_types = [*config.layer_types, config.layer_types[-1]]
        config.num_hidden_layers += 1
        layer = type(layers[0])(config, len(layers))
        for name, parameter in layer.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # the layer starts as the identity
                nn.init.zeros_(parameter)
            elif name.endswith("proj.weight"):
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
        layers.append(layer)
    if kind == "lora":
        linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
        rank = round(decoder_weights / sum(sum(module.weight.shape) for module in linears))
        for module in linears:
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, max(1, rank)))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _batches(trainers: Sequence[Trainer]) -> Iterator[list[Example]]:
    """The decoder's batches in its order, an epoch of each run, and so on from the beginning."""
    for epoch in itertools.count():
        for trainer in trainers:
            run, examples = trainer.settings, trainer.feed.examples
            for indices in epoch_order(trainer.feed.lengths, run.batch_size, run.seed, epoch):
                yield [examples[i] for i in indices]


def _of_all(counted: FlopCounterMode, device: str) -> float:
    """Floating-point operations of all processes."""
    return float(workers.add(torch.tensor(counted.get_total_flops(), dtype=torch.float64, device=device)))


def _passes(steps: range) -> int:
    """What the recursion of an optimiser step costs, in forward passes of a supervision step."""
    return 4 * len(steps) + steps.start  # forward, once more for its gradient, and that takes two


def _digest(*identity: Any) -> Tensor:
    return torch.tensor(list(hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()))


def _save(weights: Weights, step: int, path: Path, identity: Tensor) -> None:
    """Put down all that moves, so that the same call goes on from here."""
    averages = {f"{AVERAGE}{name}": tensor for name, tensor in weights.ema.average.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {STEPS: torch.tensor([step, weights.total_steps]), IDENTITY: identity}
    checkpoint.write_tensors(path, weights.tensors() | averages | about)


def _restore(weights: Weights, path: Path, identity: Tensor) -> int:
    """Take up what `_save` put down; returns the steps that are done. Raises ConfigError where that was another run."""
    tensors = checkpoint.read_tensors(path)
    step, total = tensors.pop(STEPS).tolist()
    if total != weights.total_steps or not torch.equal(tensors.pop(IDENTITY, torch.empty(0)), identity):
        raise ConfigError(f"{path}: is of another run; choose another --output-dir, or remove it to begin anew")
    averages = {n.removeprefix(AVERAGE): tensor for n, tensor in tensors.items() if n.startswith(AVERAGE)}
    weights.restore({n: tensor for n, tensor in tensors.items() if not n.startswith(AVERAGE)}, averages, str(path))
    return int(step)


def _write(directory: Path, model: Any, trainer: Trainer, record: dict[str, Any]) -> None:
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    aside = checkpoint.make_aside(directory)
    checkpoint.write_backbone(aside, Backbone.from_transformers(model.to(torch.bfloat16)))
    trainer.chat.tokenizer.save_pretrained(aside)
    checkpoint.write_json(aside / CONTROL_JSON, record)
    checkpoint.replace_directory(aside, directory)


def main() -> None:
    """Entry point of `python -m training.research.controls`."""

    def command() -> None:
        settings = ControlSettings.from_command_line()
        configure_logging(workers.log_level())
        runs: list[TrainSettings] = []
        directory: Path | None = settings.run
        while directory is not None:  # back to the run that began with a random decoder
            stored = checkpoint.read_json(directory / RUN_JSON)["settings"]
            runs.insert(0, TrainSettings(**(stored | settings.model_dump(include={"device", "num_threads"}))))
            directory = runs[0].init_from and runs[0].init_from.parent
        directory = train_control(settings.kind, runs, settings.output_dir, settings.lr)
        if workers.rank() == 0:
            print(directory)  # noqa: T201 - the command's result
        workers.leave()

    run_command(command, ControlSettings.command)


if __name__ == "__main__":
    main()
