"""What each optimiser step trains on: its batches, prepared, and the recursion's states that wait for it.

Which batches those are depends on seed and step number alone, so that a run finds its place again by a number.
With detached steps ("paper") a batch stays for `n_supervision` steps, and its states with it; with mixed depths every
row has a place of its own. Legend: B rows, S positions, Q queries, D hidden.
"""

import math
import random
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from training import workers
from training.batches import collate, epoch_order, num_labels, targets
from training.config import TrainSettings
from training.loss import Prepared, prepare, seen_vocabulary
from training.mixing import MixedRows
from training.states import States
from trm.chat import Example
from trm.model import TRMForCausalLM

MAX_NAMED_ROWS = 8  # of a batch that an error names

Carry = list[tuple[Tensor, Tensor]]  # y and z of each batch, (B, Q, D)


class Feed:
    """`fetch` a step, train on `prepared` from the states in `carry`, then `advance`.

    A group is the `gradient_accumulation` batches of an optimiser step. `states` are the backbone's.
    """

    def __init__(
        self, settings: TrainSettings, model: TRMForCausalLM, examples: Sequence[Example], pad_id: int, autocast: bool
    ) -> None:
        self.settings, self.model, self.examples = settings, model, examples
        self.pad_id, self.autocast = pad_id, autocast
        self.states = States(model, examples, autocast)
        self.vocabulary = seen_vocabulary(model, examples) if settings.train_vocabulary == "seen" else None
        self.batches: list[list[int]] = []  # indices of their examples
        self.prepared: list[Prepared] = []
        self.carry: Carry = []
        self.mixed = None if settings.mix_depths == "off" else MixedRows(settings.batch_size, settings.n_supervision)
        # Of the recursion, by which batches are made: that is what most of the time goes into.
        self.lengths = [num_labels(e) if settings.kv_source == "context" else len(e.ids) for e in examples]
        batches = -(-len(examples) // settings.batch_size)
        self.groups_per_epoch = -(-batches // settings.gradient_accumulation)
        self.steps_per_group = settings.n_supervision if settings.gradient == "paper" else 1
        self._group = -1  # that `batches` are
        self._epoch, self._order = -1, [[0]]  # the epoch at hand and its batches

    def fetch(self, step: int) -> None:
        """Make `batches`, `prepared` and `carry` those of a step. Steps come in order, or after `restore`."""
        group = step // self.steps_per_group
        if self.mixed:
            self._mix(self.mixed)
        elif group != self._group:
            self._group = group
            self.batches = self.batches_of(group)
            self.prepared = [self.prepare(indices) for indices in self.batches]
            self.carry = [(torch.zeros_like(p.x), torch.zeros_like(p.x)) for p in self.prepared]

    def advance(self, step: int, carry: Carry, halt: Tensor) -> None:
        """Take the states after a step, if they are carried on, and the halting scores (M,) of the last batch."""
        if self.settings.gradient == "full":
            return
        self.carry = carry
        if self.mixed:
            rows = self.prepared[0].answers[:, 0]
            least = torch.full((len(self.mixed.rows),), math.inf, device=halt.device)
            least = least.scatter_reduce(0, rows, halt, "amin")
            sure = (least > 0) & (self.settings.mix_depths == "halting")
            self.mixed.advance(*carry[0], sure.tolist(), random.Random(f"{self.settings.seed}/explore/{step}"))

    def num_labels(self) -> int:
        """Labels of the batches at hand, of all processes."""
        return sum(map(num_labels, self._at_hand()))

    def num_targets(self, steps: Sequence[int]) -> Tensor:
        """How many of these labels each of the supervision steps (N,) has; it has fewer where its result is shorter."""
        return torch.tensor([sum(len(targets(example, step)) for example in self._at_hand()) for step in steps])

    def rows(self) -> str:
        """The rows of the batches at hand: where each came from, and its number among the examples."""
        names = [f"{self.examples[i].source} (number {i})" for indices in self.batches for i in indices]
        more = f" and {len(names) - MAX_NAMED_ROWS} more" if len(names) > MAX_NAMED_ROWS else ""
        return f"batch group {self._group}: {', '.join(names[:MAX_NAMED_ROWS])}{more}"

    def carry_bytes(self) -> int:
        """About what `tensors` takes in the middle of a batch."""
        positions = self.settings.batch_size * self.settings.gradient_accumulation * max(self.lengths)
        return 2 * 4 * positions * self.model.config.hidden_size if self.steps_per_group > 1 else 0

    def tensors(self, step: int) -> dict[str, Tensor]:
        """What `restore` needs at a step, by name: nothing between two groups."""
        if self.mixed:
            return self.mixed.tensors()
        tensors: dict[str, Tensor] = {}
        if step % self.steps_per_group:
            for index, (indices, (y, z)) in enumerate(zip(self.batches, self.carry, strict=True)):
                tensors[f"carry.{index}.y"] = workers.whole(y, len(indices))
                tensors[f"carry.{index}.z"] = workers.whole(z, len(indices))
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Put back what `tensors` gave at a step."""
        device = self.model.device.type
        if self.mixed:
            self.mixed.restore(tensors, device)
        elif step % self.steps_per_group:
            self.fetch(step)
            self.carry = [
                (workers.share(tensors[f"carry.{i}.y"]).to(device), workers.share(tensors[f"carry.{i}.z"]).to(device))
                for i in range(len(self.prepared))
            ]

    def batches_of(self, group: int) -> list[list[int]]:
        """Indices of the examples of each batch of a group."""
        epoch, index = divmod(group, self.groups_per_epoch)
        self._open(epoch)
        first = index * self.settings.gradient_accumulation
        return self._order[first : first + self.settings.gradient_accumulation]

    def prepare(self, indices: Sequence[int]) -> Prepared:
        """This process's rows of a batch."""
        device = self.model.device.type
        batch = collate([self.examples[i] for i in indices], self.pad_id).share().to(device)
        own = workers.share(torch.tensor(indices)).tolist()
        self.states.fetch_together(indices)
        states = self.states.padded(own, batch.input_ids.shape[1])
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            return prepare(self.model, batch, states, self.vocabulary)

    def _at_hand(self) -> list[Example]:
        return [self.examples[i] for indices in self.batches for i in indices]

    def _open(self, epoch: int) -> None:
        """Make `_order` that of an epoch."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = epoch_order(self.lengths, self.settings.batch_size, self.settings.seed, epoch)

    def _mix(self, mixed: MixedRows) -> None:
        """Replace the rows that have finished, and prepare all of them."""

        def example(number: int) -> int:
            epoch, within = divmod(number, len(self.examples))
            self._open(epoch)
            return list(chain.from_iterable(self._order))[within]

        def fresh(index: int) -> Tensor:
            return torch.zeros(self.lengths[index], self.model.config.hidden_size, device=self.model.device)

        rows = mixed.fill(example, fresh)
        self.batches = [[row.index for row in rows]]
        self.prepared = [self.prepare(self.batches[0])]
        self.carry = [mixed.carry(self.prepared[0].x.shape[1])]
