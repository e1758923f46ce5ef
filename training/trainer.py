"""The training loop of the decoder: fetch, loss, check finite, update, average, save.

Everything that a step does is derived from its number: which batches, which supervision
step, which learning rate. So a run that resumes at step k goes on as if it had never
stopped, to the bit on one CPU with the same number of threads.
"""

import hashlib
import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

from training.batches import Batch, collate, epoch_order
from training.config import TrainSettings
from training.loss import Prepared, TokenLosses, halting_targets, prepare, step_weights, token_losses
from training.optim import (
    EMA,
    learning_rate_scale,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    set_learning_rate,
)
from trm import checkpoint
from trm.chat import ChatFormat, Example
from trm.device import has_fast_bfloat16
from trm.errors import CheckpointError, ConfigError, DeviceError
from trm.model import TRMForCausalLM

logger = logging.getLogger(__name__)

STATE_TENSORS = "training_state.safetensors"
STATE_JSON = "training_state.json"
FORMAT_VERSION = 1
LOG_EVERY = 10  # optimiser steps between lines of log.jsonl


class Trainer:
    """Trains `model.decoder` (and its head, if it owns one) on encoded examples.

    One optimiser step is one pass over `gradient_accumulation` batches with `gradient="full"`,
    and one supervision step over them with "paper", where the states are carried, detached, to
    the next step. `step` counts optimiser steps taken.
    """

    def __init__(
        self, settings: TrainSettings, model: TRMForCausalLM, chat: ChatFormat, examples: Sequence[Example], device: str
    ) -> None:
        self.settings = settings
        self.model = model.to(device)
        self.chat = chat
        self.examples = examples
        self.device = device
        self.autocast = settings.autocast == "on" or (settings.autocast == "auto" and has_fast_bfloat16(device))
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(
            self.parameters.items(), settings.optimizer, settings.lr, settings.weight_decay
        )
        self.ema = EMA(self.parameters)
        self.step = 0
        self.group = -1  # the group of batches that `prepared` and `carry` belong to
        self.prepared: list[Prepared] = []
        self.carry: list[tuple[Tensor, Tensor]] = []

        self._epoch, self._order = -1, [[0]]  # the epoch at hand and its batches
        self.lengths = [len(example.ids) for example in examples]
        self.data_fingerprint = fingerprint(examples)
        self.backbone_fingerprint = checkpoint.fingerprint(model.backbone)
        batches = -(-len(examples) // settings.batch_size)
        self.groups_per_epoch = -(-batches // settings.gradient_accumulation)
        self.steps_per_group = settings.n_supervision if settings.gradient == "paper" else 1
        steps = settings.epochs * self.groups_per_epoch * self.steps_per_group
        self.total_steps = min(steps, settings.max_steps or steps)
        self.warmup_steps = (
            min(2000, self.total_steps // 10) if settings.warmup_steps is None else settings.warmup_steps
        )

    def run(self, run_dir: Path) -> Path:
        """Train to the end; returns the last checkpoint. Raises DeviceError where a loss is not finite."""
        started, tokens = time.monotonic(), 0
        if self.step >= self.total_steps:
            raise ConfigError(
                f"the run is at step {self.step} of {self.total_steps} already; raise --max-steps or --epochs"
            )
        last = run_dir / f"checkpoint-{self.step}"
        with (
            (run_dir / "log.jsonl").open("a") as log,
            tqdm(total=self.total_steps, initial=self.step, unit="step") as progress,
        ):
            while self.step < self.total_steps:
                report = self.train_step()
                tokens += report["tokens"]
                progress.update()
                progress.set_postfix(loss=f"{report['loss']:.4f}", refresh=False)
                if self.step % LOG_EVERY == 0 or self.step == self.total_steps:
                    report |= {"step": self.step, "tokens_per_s": round(tokens / (time.monotonic() - started), 1)}
                    log.write(json.dumps(report) + "\n")
                    log.flush()
                if self.step % self.settings.save_steps == 0 or self.step == self.total_steps:
                    last = self.save(run_dir)
        return last

    def train_step(self) -> dict[str, Any]:
        """One optimiser step. Returns loss and token accuracy per supervision step, gradient norm, rate, labels."""
        settings = self.settings
        group, supervision_step = divmod(self.step, self.steps_per_group)
        if group != self.group:
            self._enter(group)
        depth = self._depth()
        weights = step_weights(settings.step_weights, depth)
        labels = sum(len(p.targets) for p in self.prepared)
        sums = torch.zeros(3, depth)
        for index, prepared in enumerate(self.prepared):
            with self._autocast():
                if settings.gradient == "paper":
                    steps = [self._paper_step(index, prepared)]
                else:
                    steps = list(self._full_steps(prepared, depth))
            cross_entropy, right, halt = (torch.stack(part) for part in zip(*steps, strict=True))  # each (N, M)
            may_halt = right
            if settings.gradient == "full":
                may_halt = halting_targets(cross_entropy.detach(), right, settings.halt_delta)
            halting = F.binary_cross_entropy_with_logits(halt, may_halt.float(), reduction="none")
            loss = (weights.to(self.device) * cross_entropy.sum(1)).sum() + halting.sum(1).mean()
            (loss / labels).backward()
            sums += torch.stack([part.detach().float().sum(1) for part in (cross_entropy, halting, right)]).cpu()
        losses, halting, right = sums / labels
        scale = learning_rate_scale(self.step, self.total_steps, self.warmup_steps)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm)
        if not torch.isfinite(norm) or not torch.isfinite(sums).all():
            raise DeviceError(
                f"step {self.step + 1}: loss {losses.tolist()} or gradient norm {float(norm)} is not finite "
                f"(batch group {group}); resume from the last checkpoint with a lower --lr"
            )
        set_learning_rate(self.optimizers, scale)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.ema.update(self.step)
        return {
            "loss": float((weights * losses).sum()),
            "supervision_step": supervision_step + 1 if settings.gradient == "paper" else None,
            "losses": [round(v, 5) for v in losses.tolist()],
            "halting_losses": [round(v, 5) for v in halting.tolist()],
            "token_accuracies": [round(v, 5) for v in right.tolist()],
            "grad_norm": float(norm),
            "lr": settings.lr * scale,
            "tokens": labels,
        }

    def save(self, run_dir: Path) -> Path:
        """Write `checkpoint-<step>`: servable EMA weights, and what resuming needs. Written aside, then renamed."""
        directory = run_dir / f"checkpoint-{self.step}"
        aside = checkpoint.make_aside(directory)
        checkpoint.write_into(aside, self.model.config, self.ema.average, self.model.backbone, self.chat.tokenizer)
        tensors = {f"master.{name}": p for name, p in self.parameters.items()} | optimizer_tensors(self.optimizers)
        if self.step % self.steps_per_group:
            for index, (y, z) in enumerate(self.carry):
                tensors |= {f"carry.{index}.y": y, f"carry.{index}.z": z}
        checkpoint.write_tensors(aside / STATE_TENSORS, tensors)
        state = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "data_fingerprint": self.data_fingerprint,
            "backbone_fingerprint": self.backbone_fingerprint,
            "settings": self.settings.model_dump(mode="json", exclude={"config", "resume"}),
        }
        checkpoint.write_json(aside / STATE_JSON, state)
        checkpoint.replace_directory(aside, directory)
        logger.info("saved %s", directory)
        return directory

    def load(self, directory: Path) -> None:
        """Put everything back as `save` left it. Raises CheckpointError where it does not fit."""
        state = read_state(directory)
        tensors = checkpoint.read_tensors(directory / STATE_TENSORS)
        if state["data_fingerprint"] != self.data_fingerprint:
            raise CheckpointError(f"{directory}: was trained on other data than --dataset gives now")
        if state["backbone_fingerprint"] != self.backbone_fingerprint:
            raise CheckpointError(f"{directory}: was trained on another backbone than --backbone gives now")
        masters = {name.removeprefix("master."): t for name, t in tensors.items() if name.startswith("master.")}
        checkpoint.check_tensors(
            masters, {name: p.shape for name, p in self.parameters.items()}, str(directory / STATE_TENSORS)
        )
        averages = checkpoint.read_tensors(directory / checkpoint.WEIGHTS_FILE)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(masters[name])
                self.ema.average[name].copy_(averages[name])
        try:
            load_optimizer_tensors(self.optimizers, tensors)
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{directory / STATE_TENSORS}: the optimiser's state does not fit: {error}"
            ) from error
        self.step = state["step"]
        group, inside = divmod(self.step, self.steps_per_group)
        if inside:
            self._enter(group)
            device = self.device
            self.carry = [
                (tensors[f"carry.{i}.y"].to(device), tensors[f"carry.{i}.z"].to(device))
                for i in range(len(self.prepared))
            ]

    def _enter(self, group: int) -> None:
        """Encode the batches of a group and start their states at zero."""
        self.group = group
        self.prepared = []
        for batch in self._batches(group):
            with self._autocast():
                self.prepared.append(prepare(self.model, batch))
        self.carry = [(torch.zeros_like(p.x), torch.zeros_like(p.x)) for p in self.prepared]

    def _batches(self, group: int) -> Iterator[Batch]:
        epoch, index = divmod(group, self.groups_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = epoch_order(self.lengths, self.settings.batch_size, self.settings.seed, epoch)
        first = index * self.settings.gradient_accumulation
        for indices in self._order[first : first + self.settings.gradient_accumulation]:
            batch = collate([self.examples[i] for i in indices], self.chat.tokenizer.pad_token_id or 0)
            yield Batch(*(t.to(self.device) for t in (batch.input_ids, batch.attention_mask, batch.labels)))

    def _depth(self) -> int:
        """How many supervision steps the optimiser step at hand runs: a function of seed and step number."""
        if self.settings.gradient == "paper":
            return 1
        deepest = self.settings.n_supervision
        rng = random.Random(f"{self.settings.seed}/depth/{self.step}")
        return rng.randint(self.settings.min_supervision or deepest, deepest)

    def _paper_step(self, index: int, prepared: Prepared) -> TokenLosses:
        """One supervision step from the carried states; gradient through the last cycle only."""
        y, z = self.model.decoder.step(prepared.x, *self.carry[index], prepared.attending(self.model), grad_cycles=1)
        self.carry[index] = (y.detach(), z.detach())
        return token_losses(self.model, y, prepared)

    def _full_steps(self, prepared: Prepared, depth: int) -> Iterator[TokenLosses]:
        """`depth` supervision steps with gradient through all of them.

        Activations and logits are recomputed in the backward pass: only the states and the losses of a step are kept.
        """
        attending = prepared.attending(self.model)

        def step(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, TokenLosses]:
            y, z = self.model.decoder.step(prepared.x, y, z, attending)
            return y, z, token_losses(self.model, y, prepared)

        y = z = torch.zeros_like(prepared.x)
        for _ in range(depth):
            y, z, losses = recompute_in_backward(step, y, z, use_reentrant=False)
            yield losses

    def _autocast(self) -> torch.autocast:
        """Matrix products in bfloat16 where that is fast."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.autocast)


def read_state(directory: Path) -> dict[str, Any]:
    """The JSON half of a training state. Raises CheckpointError where it is foreign or of another version."""
    path = directory / STATE_JSON
    state = checkpoint.read_json(path)
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version is {state.get('format_version')}; this program reads {FORMAT_VERSION}"
        )
    kinds = {"step": int, "data_fingerprint": str, "backbone_fingerprint": str, "settings": dict}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{path}: {name} is missing or no {kind.__name__}")
    return state


def fingerprint(examples: Sequence[Example]) -> str:
    """First 16 hex digits of a SHA-256 over all token ids and label starts, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example.label_start, len(example.ids), *example.ids], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]
