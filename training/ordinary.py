"""An ordinary causal language model in training: the bundled backbone, and what the decoder is compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training import workers
from training.batches import IGNORE_INDEX, collate, num_labels
from trm.chat import Example
from trm.device import has_fast_bfloat16


def add_gradients(model: Any, examples: Sequence[Example], pad_id: int) -> Tensor:
    """Forward and backward over the replies of a batch, of all processes; returns a label's mean cross-entropy ()."""
    batch = collate(examples, pad_id).share().to(model.device)
    labels = batch.labels[-1]
    labelled = labels != IGNORE_INDEX
    device = model.device.type
    with torch.autocast(device, torch.bfloat16, enabled=has_fast_bfloat16(device)):
        # Padding stands on the right, where no real token can see it: causal attention needs no mask.
        hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[labelled])
        total = F.cross_entropy(logits.float(), labels[labelled], reduction="sum")
    loss = total / sum(map(num_labels, examples))
    loss.backward()
    workers.add_gradients(model.parameters())
    return workers.add(loss.detach())
