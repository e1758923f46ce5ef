"""The training loop of the decoder: fetch, loss, check finite, update, average, log, save.

Everything that a step does is derived from its number: which batches, which supervision
step, which learning rate. So a run that resumes at step k goes on as if it had never
stopped, to the bit on one CPU with the same number of threads.
"""

import logging
import math
import random
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import checkpoints, states, workers
from training.checkpoints import STATE_TENSORS, read_state
from training.config import TrainSettings
from training.feed import Carry, Feed
from training.loss import full_steps, objective, paper_step, step_weights
from training.problems.data import fingerprint
from training.run_log import RunLog
from training.states import States
from training.validation import Validation, averaged, measure
from training.weights import Weights
from trm import checkpoint
from trm.chat import ChatFormat, Example
from trm.device import has_fast_bfloat16
from trm.errors import CheckpointError, ConfigError, DeviceError
from trm.model import TRMForCausalLM

logger = logging.getLogger(__name__)


class Trainer:
    """Trains `model.decoder` (and its head, if it owns one) on encoded examples.

    One optimiser step is one pass over `gradient_accumulation` batches with `gradient="full"`,
    and one supervision step over them with "paper", where the states are carried, detached, to
    the next step. `step` counts optimiser steps taken.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: TRMForCausalLM,
        chat: ChatFormat,
        examples: Sequence[Example],
        device: str,
        validation: Sequence[Example] = (),
    ) -> None:
        self.settings = settings
        self.model = model.to(device)
        self.chat = chat
        self.device = device
        self.validation = validation
        self.autocast = settings.autocast == "on" or (settings.autocast == "auto" and has_fast_bfloat16(device))
        self.feed = Feed(settings, model, examples, self.pad_id, self.autocast)
        self.validation_states = States(model, validation, self.autocast)
        self.steps_of_epochs = settings.epochs * self.feed.groups_per_epoch * self.feed.steps_per_group
        self.total_steps = min(self.steps_of_epochs, settings.max_steps or self.steps_of_epochs)
        self.weights = Weights(
            {name: p for name, p in model.named_parameters() if p.requires_grad}, settings, self.total_steps
        )
        self.data_fingerprint = fingerprint(examples)
        self.backbone_fingerprint = checkpoint.fingerprint(model.backbone)
        self.step = 0
        self.wall_s = 0.0  # spent in `run` up to the last checkpoint

    @property
    def pad_id(self) -> int:
        return self.chat.tokenizer.pad_token_id or 0

    def keep_states(self, directory: Path) -> None:
        """Have the backbone's states kept from now on, if the settings want that; files go to `directory`.

        What "auto" came to is part of the settings from here on, so that a resumed run does the same. Those of the
        validation problems are kept where there is room, if they are measured more than once.
        """
        feed, mixing = self.feed, f"--mix-depths {self.settings.mix_depths}"
        if feed.mixed and workers.count() > 1:
            raise ConfigError(f"{mixing}: works in one process only; leave it out, or start without torchrun")
        epochs = math.inf if feed.mixed else self.total_steps / (feed.groups_per_epoch * feed.steps_per_group)
        place, feed.states = states.keep(feed.states, self.settings.cache_states, directory, epochs)
        validations = self.total_steps / self.settings.save_steps
        _, self.validation_states = states.keep(self.validation_states, "auto", directory, validations)
        self.settings = self.settings.model_copy(update={"cache_states": place})
        if feed.mixed and place == "off":
            raise ConfigError(
                f"{mixing}: must keep the backbone's states, "
                f"{states.size_bytes(self.model, feed.examples) / 1e9:.1f} GB; "
                "make room, and leave out --cache-states off"
            )

    def run(self, run_dir: Path, stop: threading.Event | None = None) -> Path:
        """Train to the end, or until `stop` is set; returns the last checkpoint.

        Raises DeviceError where a loss is not finite, after saving the state before that step, and
        CheckpointError where a checkpoint cannot be written.
        """
        if self.step >= self.total_steps:
            limits = {"--epochs": self.steps_of_epochs, "--max-steps": self.settings.max_steps or math.inf}
            reached = " and ".join(flag for flag, steps in limits.items() if steps <= self.step)
            raise ConfigError(f"the run is at step {self.step} of {self.total_steps} already; raise {reached}")
        started = time.monotonic() - self.wall_s
        deepest = self.settings.n_supervision + self.settings.skip_supervision
        log = RunLog(run_dir, self.step, self.total_steps, deepest) if workers.rank() == 0 else None
        with log or nullcontext():
            while True:
                try:
                    report = self.train_step()
                except DeviceError as error:
                    last = self._save_and_prune(run_dir, log, started, with_validation=False)
                    raise DeviceError(f"{error}; the state before that step is saved: {last}") from error
                stopped = workers.any_of(stop is not None and stop.is_set(), self.device)
                is_due = self.step == self.total_steps or self.step % self.settings.save_steps == 0
                ends = stopped or self.step == self.total_steps
                if log:
                    log.training(self.step, report, ends)
                if ends or is_due:
                    last = self._save_and_prune(run_dir, log, started, with_validation=is_due)
                if ends:
                    return last

    def train_step(self) -> dict[str, Any]:
        """One optimiser step. Returns loss and token accuracy per supervision step, gradient norm, rate, labels.

        Raises DeviceError, with weights and states as they were before, where a number is not finite.
        """
        settings, feed = self.settings, self.feed
        feed.fetch(self.step)
        steps = self.supervision_steps(self.step)
        labels, targets = feed.num_labels(), feed.num_targets(steps)
        importance = step_weights(settings.step_weights, len(steps))
        parts, carry, halt = self._add_gradients(labels, importance * (labels / targets), steps)
        losses, halting, right = parts[0] / targets, parts[1] / labels, parts[2] / targets
        norm = self.weights.clip_gradients()
        if not torch.isfinite(norm) or not torch.isfinite(parts).all():
            raise DeviceError(
                f"step {self.step + 1}: loss {losses.tolist()} or gradient norm {float(norm)} is not finite "
                f"({feed.rows()}); go on with a lower --lr, if need be from an older checkpoint, or look at these rows"
            )
        scale = self.weights.update(self.step)
        feed.advance(self.step, carry, halt)
        self.step += 1
        return {
            "loss": float((importance * losses).sum()),
            "supervision_step": None if feed.mixed else steps[0] + 1,  # the first of those that follow
            "losses": losses.tolist(),
            "halting_losses": halting.tolist(),
            "token_accuracies": right.tolist(),
            "grad_norm": float(norm),
            "lr": settings.lr * scale,
            "tokens": labels,
        }

    def _add_gradients(self, labels: int, importance: Tensor, numbers: range) -> tuple[Tensor, Carry, Tensor]:
        """Forward and backward over the batches at hand, of all processes, with a gradient per label.

        `importance` (N,) weighs the N supervision steps of these numbers. Returns the sums of `Objective.parts` (3, N),
        the states to carry on, and the halting scores of the last batch.
        """
        is_paper = self.settings.gradient == "paper"
        parts = torch.zeros(3, len(importance), device=self.device)
        carry: Carry = []
        for prepared, (y, z) in zip(self.feed.prepared, self.feed.carry, strict=True):
            with self._autocast():
                if is_paper:
                    y, z, token_losses = paper_step(self.model, prepared, y, z, numbers[0])
                    carry.append((y, z))
                    steps = [token_losses]
                else:
                    steps = list(full_steps(self.model, prepared, numbers))
            found = objective(steps, importance, None if is_paper else self.settings.halt_delta)
            (found.loss / labels).backward()
            parts += found.parts
        workers.add_gradients(self.weights.parameters.values())
        return workers.add(parts).cpu(), carry, steps[-1].halt.detach()

    def supervision_steps(self, step: int) -> range:
        """Those that an optimiser step runs, from 0: a function of seed and its number.

        Where depths are mixed a step has no number; this gives one that means nothing.
        """
        if self.settings.gradient == "paper":
            number = step % self.feed.steps_per_group
            return range(number, number + 1)
        deepest = self.settings.n_supervision
        rng = random.Random(f"{self.settings.seed}/depth/{step}")
        depth = rng.randint(self.settings.min_supervision or deepest, deepest)
        skipped = rng.randint(1, limit) if (limit := self.settings.skip_supervision) and rng.random() < 0.5 else 0
        return range(skipped, skipped + depth)

    def validate(self) -> Validation | None:
        """Losses of the averaged weights on the validation problems; None without any."""
        if not self.validation:
            return None
        with averaged(self.weights.ema), self._autocast():
            return measure(self.model, self.validation_states, self.settings.batch_size, self.pad_id)

    def save(self, run_dir: Path, validation: Validation | None = None) -> Path:
        """Write `checkpoint-<step>`: servable EMA weights, and what resuming needs. Written aside, then renamed.

        Of several processes the first writes. Raises CheckpointError, and leaves nothing behind, where it cannot.
        """
        directory = run_dir / f"checkpoint-{self.step}"
        tensors = self.weights.tensors() | self.feed.tensors(self.step)
        if workers.rank() > 0:
            return directory
        aside, average = checkpoint.make_aside(directory), self.weights.ema.average
        try:
            checkpoint.write_into(aside, self.model.config, average, self.model.backbone, self.chat.tokenizer)
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

    def load(self, directory: Path) -> None:
        """Put everything back as `save` left it. Raises CheckpointError where it does not fit."""
        state = read_state(directory)
        if state["data_fingerprint"] != self.data_fingerprint:
            raise CheckpointError(
                f"{directory}: was trained on other data than --dataset gives now; give it the same data"
            )
        if state["backbone_fingerprint"] != self.backbone_fingerprint:
            raise CheckpointError(
                f"{directory}: was trained on another backbone than --backbone gives now; give it the same one"
            )
        if state["validation_fingerprint"] != fingerprint(self.validation):
            raise CheckpointError(
                f"{directory}: was validated on other problems than --validation gives now; give it the same"
            )
        tensors = checkpoint.read_tensors(directory / STATE_TENSORS)
        averages = checkpoint.read_tensors(directory / checkpoint.WEIGHTS_FILE)
        self.weights.restore(tensors, averages, str(directory / STATE_TENSORS))
        self.step, self.wall_s = state["step"], state["wall_s"]
        self.feed.restore(tensors, self.step)

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
        is_copied = self.model.config.backbone_source is None
        copied = sum(p.nbytes for p in self.model.backbone.parameters()) if is_copied else 0
        return self.weights.num_bytes() + self.feed.carry_bytes() + copied

    def _save_and_prune(self, run_dir: Path, log: RunLog | None, started: float, with_validation: bool) -> Path:
        """A checkpoint, with its validation loss, in the place of one that is no longer needed.

        Who stops a run does not wait for a validation: of a large model it takes minutes.
        """
        if log is None:
            return self.save(run_dir)
        validation = self.validate() if with_validation else None
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

    def _autocast(self) -> torch.autocast:
        """Matrix products in bfloat16 where that is fast."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.autocast)
