"""The oracle: one prompt, no cache, no batch, every token from a forward pass over the whole sequence.

Slow and obvious. Tests compare `generate()` and the engine with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trm.engine.request import SamplingParams
from trm.engine.sampling import adjusted_scores
from trm.model import TRMForCausalLM


@dataclass(frozen=True)
class ReferenceReply:
    """Reply tokens, end token included, and by how much each beat the second best score."""

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]


@torch.inference_mode()
def decode(
    model: TRMForCausalLM, prompt_ids: Sequence[int], params: SamplingParams, end_id: int | None
) -> ReferenceReply:
    """Decode one prompt. `end_id` None: only `max_tokens` ends the reply. Stop strings are not looked for."""
    ids = list(prompt_ids)
    gaps: list[float] = []
    for _ in range(params.max_tokens):
        tokens = torch.tensor([ids], device=model.device)
        logits = model(tokens, n_supervision=params.n_supervision, logits_to_keep=1, use_cache=False).logits[0, -1]
        scores = adjusted_scores(logits, params, prompt_ids, ids[len(prompt_ids) :])
        second, first = np.sort(scores)[-2:]
        gaps.append(float(first - second))
        ids.append(int(scores.argmax()))
        if ids[-1] == end_id and not params.ignore_eos:
            break
    return ReferenceReply(tuple(ids[len(prompt_ids) :]), tuple(gaps))
