"""Group examples into padded batches of similar length.

Pure functions of their arguments: the same examples and seed give the same batches,
which is what lets an interrupted run find its place again by a number.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training import workers
from trm.chat import Example

IGNORE_INDEX = -100  # a position that carries no label
PAD_MULTIPLE = 8  # widths are rounded up to this, so that allocators and kernels see few shapes
POOL_BATCHES = 16  # lengths are sorted within pools of this many batches


@dataclass(frozen=True)
class Batch:
    """B examples padded on the right to S positions.

    `input_ids`, `attention_mask` (B, S); `labels` (T, B, S): the id that *follows* each
    position where that is part of a reply, else IGNORE_INDEX. The last of the T are those of the final answer;
    the others, if any, what the first supervision steps learn in its place. `num_queries` is the number of
    final labels of the row that has most.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    num_queries: int

    def to(self, device: torch.device | str) -> "Batch":
        ids, mask, labels = (t.to(device) for t in (self.input_ids, self.attention_mask, self.labels))
        return Batch(ids, mask, labels, self.num_queries)

    def share(self) -> "Batch":
        """The rows of this process, as wide as all of them; with fewer rows than processes maybe one without labels."""
        ids, mask = workers.share(self.input_ids), workers.share(self.attention_mask)
        labels = workers.share(self.labels.transpose(0, 1)).transpose(0, 1)
        if workers.rank() >= len(self.input_ids):
            labels = torch.full_like(labels, IGNORE_INDEX)
        return Batch(ids, mask, labels, self.num_queries)


def num_labels(example: Example) -> int:
    """How many of its tokens are to be predicted."""
    return len(example.ids) - example.label_start


def targets(example: Example, step: int) -> tuple[int, ...]:
    """What supervision step `step` (from 0) learns from the first token of the reply on: at most as long as the reply.

    Step t learns the t-th intermediate result, the steps after the last one the answer.
    """
    answer = example.ids[example.label_start :]
    return example.step_replies[step][: len(answer)] if step < len(example.step_replies) else answer


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad on the right; the label of a position is the token that follows it, inside the reply only."""
    length = -(-max(len(e.ids) for e in examples) // PAD_MULTIPLE) * PAD_MULTIPLE
    input_ids = torch.full((len(examples), length), pad_id)
    attention_mask = torch.zeros((len(examples), length), dtype=torch.long)
    num_targets = 1 + max(len(e.step_replies) for e in examples)
    labels = torch.full((num_targets, len(examples), length), IGNORE_INDEX)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        for step in range(num_targets):
            reply = torch.tensor(targets(example, step))
            labels[step, row, example.label_start - 1 :][: len(reply)] = reply
    return Batch(input_ids, attention_mask, labels, max(map(num_labels, examples)))


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of each batch of one epoch: shuffled, similar lengths together, every index once.

    The last batch may be smaller.
    """
    rng = random.Random(f"{seed}/{epoch}")
    indices = list(range(len(lengths)))
    rng.shuffle(indices)
    batches: list[list[int]] = []
    pool = batch_size * POOL_BATCHES
    for start in range(0, len(indices), pool):
        by_length = sorted(indices[start : start + pool], key=lambda i: lengths[i])
        batches.extend(by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size))
    rng.shuffle(batches)
    return batches
