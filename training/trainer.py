"""The training loop of the decoder: fetch, loss, check finite, update, average, save.

Everything that a step does is derived from its number: which batches, which supervision
step, which learning rate. So a run that resumes at step k goes on as if it had never
stopped, to the bit on one CPU with the same number of threads.
"""

import hashlib
import logging
import math
import random
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from training import checkpoints, workers
from training.batches import collate, epoch_order, num_labels
from training.checkpoints import STATE_TENSORS, read_state
from training.config import TrainSettings
from training.loss import Prepared, TokenLosses, halting_targets, prepare, step_weights, token_losses
from training.mixing import MixedRows
from training.optim import (
    EMA,
    learning_rate_scale,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    set_learning_rate,
    warmup_steps,
)
from training.run_log import RunLog
from training.states import States, choose, file_in, in_memory, on_disk, size_bytes
from training.validation import Validation, averaged, measure
from trm import checkpoint
from trm.chat import ChatFormat, Example
from trm.device import has_fast_bfloat16
from trm.errors import CheckpointError, ConfigError, DeviceError
from trm.model import TRMForCausalLM

logger = logging.getLogger(__name__)

MAX_NAMED_ROWS = 8  # of a batch that an error names


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
        self.states: States | None = None
        self.wall_s = 0.0  # spent in `run` up to the last checkpoint
        self.validation: Sequence[Example] = ()
        self.group = -1  # the group of batches that `prepared` and `carry` belong to
        self.batches: list[list[int]] = []  # indices of their examples
        self.prepared: list[Prepared] = []
        self.carry: list[tuple[Tensor, Tensor]] = []
        self.mixed = None if settings.mix_depths == "off" else MixedRows(settings.batch_size, settings.n_supervision)

        self._epoch, self._order = -1, [[0]]  # the epoch at hand and its batches
        # Of the recursion, by which batches are made: that is what most of the time goes into.
        self.lengths = [num_labels(e) if settings.kv_source == "context" else len(e.ids) for e in examples]
        self.data_fingerprint = fingerprint(examples)
        self.backbone_fingerprint = checkpoint.fingerprint(model.backbone)
        batches = -(-len(examples) // settings.batch_size)
        self.groups_per_epoch = -(-batches // settings.gradient_accumulation)
        self.steps_per_group = settings.n_supervision if settings.gradient == "paper" else 1
        steps = settings.epochs * self.groups_per_epoch * self.steps_per_group
        self.total_steps = min(steps, settings.max_steps or steps)
        self.warmup_steps = warmup_steps(settings.warmup_steps, self.total_steps)

    def keep_states(self, directory: Path) -> None:
        """Compute the backbone's states now and keep them, if the settings want that; files go to `directory`.

        What "auto" came to is part of the settings from here on, so that a resumed run does the same.
        """
        model, examples = self.model, self.examples
        if self.mixed and workers.count() > 1:
            raise ConfigError(f"--mix-depths {self.settings.mix_depths}: takes one process; leave it out, or torchrun")
        epochs = math.inf if self.mixed else self.total_steps / (self.groups_per_epoch * self.steps_per_group)
        needed = size_bytes(model, examples)
        file = file_in(directory, model, f"{self.data_fingerprint}/{self.backbone_fingerprint}", self.autocast)
        place = workers.agree(choose(self.settings.cache_states, needed, file, epochs))
        self.settings = self.settings.model_copy(update={"cache_states": place})
        if place == "off":
            if self.mixed:
                raise ConfigError(
                    f"--mix-depths {self.settings.mix_depths}: keeps the backbone's states, {needed / 1e9:.1f} GB; "
                    "make room, and leave out --cache-states off"
                )
            return
        logger.info("keeping the backbone's states: %.2f GB, %s", needed / 1e9, place)
        if place == "memory":
            self.states = in_memory(model, examples, self.autocast)
        else:
            self.states = on_disk(model, examples, self.autocast, file)

    def run(self, run_dir: Path, stop: threading.Event | None = None) -> Path:
        """Train to the end, or until `stop` is set; returns the last checkpoint.

        Raises DeviceError where a loss is not finite, after saving the state before that step, and
        CheckpointError where a checkpoint cannot be written.
        """
        if self.step >= self.total_steps:
            raise ConfigError(
                f"the run is at step {self.step} of {self.total_steps} already; raise --max-steps or --epochs"
            )
        started = time.monotonic() - self.wall_s
        log = RunLog(run_dir, self.step, self.total_steps, self.settings.n_supervision) if workers.rank() == 0 else None
        with log or nullcontext():
            while True:
                carry = list(self.carry)
                try:
                    report = self.train_step()
                except DeviceError as error:
                    self.carry = carry  # of before the step, like the weights
                    last = self._save_and_prune(run_dir, log, started)
                    raise DeviceError(f"{error}; the state before that step is saved: {last}") from error
                stopped = workers.any_of(stop is not None and stop.is_set(), self.device)
                ends = stopped or self.step == self.total_steps
                if log:
                    log.training(self.step, report, ends)
                if ends or self.step % self.settings.save_steps == 0:
                    last = self._save_and_prune(run_dir, log, started)
                if ends:
                    return last

    def train_step(self) -> dict[str, Any]:
        """One optimiser step. Returns loss and token accuracy per supervision step, gradient norm, rate, labels."""
        settings = self.settings
        group, supervision_step = divmod(self.step, self.steps_per_group)
        if self.mixed:
            self._mix(self.mixed)
        elif group != self.group:
            self._enter(group)
        depth = self._depth()
        weights = step_weights(settings.step_weights, depth)
        labels = sum(num_labels(self.examples[i]) for indices in self.batches for i in indices)
        sums = torch.zeros(3, depth, device=self.device)
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
            sums += torch.stack([part.detach().float().sum(1) for part in (cross_entropy, halting, right)])
        workers.add_gradients(self.parameters.values())
        sums = workers.add(sums).cpu()
        losses, halting, right = sums / labels
        scale = learning_rate_scale(self.step, self.total_steps, self.warmup_steps)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm)
        if not torch.isfinite(norm) or not torch.isfinite(sums).all():
            raise DeviceError(
                f"step {self.step + 1}: loss {losses.tolist()} or gradient norm {float(norm)} is not finite "
                f"(batch group {group}: {self._rows()}); go on with a lower --lr, or look at these rows"
            )
        set_learning_rate(self.optimizers, scale)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.mixed:
            self._advance(self.mixed, steps[0].halt)
        self.step += 1
        self.ema.update(self.step)
        return {
            "loss": float((weights * losses).sum()),
            "supervision_step": supervision_step + 1 if settings.gradient == "paper" and not self.mixed else None,
            "losses": [round(v, 5) for v in losses.tolist()],
            "halting_losses": [round(v, 5) for v in halting.tolist()],
            "token_accuracies": [round(v, 5) for v in right.tolist()],
            "grad_norm": float(norm),
            "lr": settings.lr * scale,
            "tokens": labels,
        }

    def save(self, run_dir: Path, validation: Validation | None = None) -> Path:
        """Write `checkpoint-<step>`: servable EMA weights, and what resuming needs. Written aside, then renamed.

        Of several processes the first writes. Raises CheckpointError, and leaves nothing behind, where it cannot.
        """
        directory = run_dir / f"checkpoint-{self.step}"
        tensors = self._tensors()
        if workers.rank() > 0:
            return directory
        aside = checkpoint.make_aside(directory)
        try:
            checkpoint.write_into(aside, self.model.config, self.ema.average, self.model.backbone, self.chat.tokenizer)
            checkpoint.write_tensors(aside / STATE_TENSORS, tensors)
            checkpoints.put_in_place(aside, directory, self.state(validation))
        except Exception as error:  # each library has its own for a full disk
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"{directory}: cannot be saved: {error}; older checkpoints are unharmed: "
                f"make room, then go on with trm-train --resume {run_dir}"
            ) from error
        logger.info("saved %s", directory)
        return directory

    def _tensors(self) -> dict[str, Tensor]:
        """What resuming needs beside the averages: masters, optimiser, and states in the middle of a batch."""
        tensors = {f"master.{name}": p for name, p in self.parameters.items()} | optimizer_tensors(self.optimizers)
        if self.mixed:
            return tensors | self.mixed.tensors()
        if self.step % self.steps_per_group:
            for index, (indices, (y, z)) in enumerate(zip(self.batches, self.carry, strict=True)):
                tensors[f"carry.{index}.y"] = workers.whole(y, len(indices))
                tensors[f"carry.{index}.z"] = workers.whole(z, len(indices))
        return tensors

    def state(self, validation: Validation | None = None) -> checkpoints.State:
        """What a checkpoint says of the run that it belongs to, and of where in it it stands."""
        return {
            "step": self.step,
            "wall_s": round(self.wall_s, 1),
            "data_fingerprint": self.data_fingerprint,
            "backbone_fingerprint": self.backbone_fingerprint,
            "validation_fingerprint": fingerprint(self.validation),
            "validation": validation and {"loss": validation.losses[-1], "losses": validation.losses},
            "settings": self.settings.model_dump(mode="json", exclude={"config", "resume"}),
        }

    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: averages, masters, two moments, states in the middle of a batch, backbone."""
        trained = 4 * sum(p.nbytes for p in self.parameters.values())
        positions = self.settings.batch_size * self.settings.gradient_accumulation * max(self.lengths)
        carried = 2 * 4 * positions * self.model.config.hidden_size if self.steps_per_group > 1 else 0
        is_copied = self.model.config.backbone_source is None
        copied = sum(p.nbytes for p in self.model.backbone.parameters()) if is_copied else 0
        return int(trained + carried + copied)

    def validate(self) -> Validation | None:
        """Losses of the averaged weights on the validation problems; None without any."""
        if not self.validation:
            return None
        with averaged(self.ema), self._autocast():
            return measure(self.model, self.validation, self.settings.batch_size, self.chat.tokenizer.pad_token_id or 0)

    def _save_and_prune(self, run_dir: Path, log: RunLog | None, started: float) -> Path:
        """A checkpoint, with its validation loss, in the place of one that is no longer needed."""
        if log is None:
            return self.save(run_dir)
        validation = self.validate()
        if validation is not None:
            log.validation(self.step, validation)
        log.flush()
        self.wall_s = time.monotonic() - started
        directory = self.save(run_dir, validation)
        state = self.state(validation)
        checkpoints.prune(run_dir, state, self.settings.keep_last)
        checkpoints.record_progress(run_dir, state, log.last)
        log.pause()
        return directory

    def load(self, directory: Path) -> None:
        """Put everything back as `save` left it. Raises CheckpointError where it does not fit."""
        state = read_state(directory)
        tensors = checkpoint.read_tensors(directory / STATE_TENSORS)
        if state["data_fingerprint"] != self.data_fingerprint:
            raise CheckpointError(f"{directory}: was trained on other data than --dataset gives now")
        if state["backbone_fingerprint"] != self.backbone_fingerprint:
            raise CheckpointError(f"{directory}: was trained on another backbone than --backbone gives now")
        if state["validation_fingerprint"] != fingerprint(self.validation):
            raise CheckpointError(f"{directory}: was validated on other problems than --validation gives now")
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
        self.step, self.wall_s = state["step"], state["wall_s"]
        group, inside = divmod(self.step, self.steps_per_group)
        if self.mixed:
            self.mixed.restore(tensors, self.device)
        elif inside:
            self._enter(group)
            device = self.device
            self.carry = [
                (workers.share(tensors[f"carry.{i}.y"]).to(device), workers.share(tensors[f"carry.{i}.z"]).to(device))
                for i in range(len(self.prepared))
            ]

    def _enter(self, group: int) -> None:
        """Prepare the batches of a group and start their states at zero."""
        self.group = group
        self.batches = self._batches(group)
        self.prepared = [self._prepare(indices) for indices in self.batches]
        self.carry = [(torch.zeros_like(p.x), torch.zeros_like(p.x)) for p in self.prepared]

    def _prepare(self, indices: Sequence[int]) -> Prepared:
        """This process's rows of a batch."""
        pad_id = self.chat.tokenizer.pad_token_id or 0
        batch = collate([self.examples[i] for i in indices], pad_id).share().to(self.device)
        own = workers.share(torch.tensor(indices)).tolist()
        states = self.states.padded(own, batch.input_ids.shape[1]) if self.states else None
        with self._autocast():
            return prepare(self.model, batch, states)

    def _batches(self, group: int) -> list[list[int]]:
        """Indices of the examples of each batch of a group."""
        epoch, index = divmod(group, self.groups_per_epoch)
        self._open(epoch)
        first = index * self.settings.gradient_accumulation
        return self._order[first : first + self.settings.gradient_accumulation]

    def _open(self, epoch: int) -> None:
        """Make `_order` that of an epoch."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = epoch_order(self.lengths, self.settings.batch_size, self.settings.seed, epoch)

    def _rows(self) -> str:
        """The rows of the group at hand: where each came from, and its number among the examples."""
        names = [f"{self.examples[i].source} (number {i})" for indices in self.batches for i in indices]
        more = f" and {len(names) - MAX_NAMED_ROWS} more" if len(names) > MAX_NAMED_ROWS else ""
        return ", ".join(names[:MAX_NAMED_ROWS]) + more

    def _mix(self, mixed: MixedRows) -> None:
        """Replace the rows that have finished, and prepare all of them."""

        def example(number: int) -> int:
            epoch, within = divmod(number, len(self.examples))
            self._open(epoch)
            return list(chain.from_iterable(self._order))[within]

        def fresh(index: int) -> Tensor:
            return torch.zeros(self.lengths[index], self.model.config.hidden_size, device=self.device)

        rows = mixed.fill(example, fresh)
        self.batches = [[row.index for row in rows]]
        self.prepared = [self._prepare(self.batches[0])]
        self.carry = [mixed.carry(self.prepared[0].x.shape[1])]

    def _advance(self, mixed: MixedRows, halt: Tensor) -> None:
        """Count the step of every row; one whose halting head is sure of every label may leave."""
        rows = self.prepared[0].answers[:, 0]
        least = torch.full((len(mixed.rows),), math.inf, device=self.device).scatter_reduce(0, rows, halt, "amin")
        sure = (least > 0) & (self.settings.mix_depths == "halting")
        mixed.advance(*self.carry[0], sure.tolist(), random.Random(f"{self.settings.seed}/explore/{self.step}"))

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


def fingerprint(examples: Sequence[Example]) -> str:
    """First 16 hex digits of a SHA-256 over all token ids and label starts, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example.label_start, len(example.ids), *example.ids], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]
