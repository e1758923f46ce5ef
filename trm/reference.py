"""The oracle: one prompt, no cache, no batch, every token from a pass over the whole sequence.

Slow and obvious. Tests compare `generate()` and the engine with it. It shares `adjusted_scores` and the
halting rule with the engine: what it vouches for is cache, batch, drafts and schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trm.cache import Sequences
from trm.engine.request import Follow, Grammar, SamplingParams
from trm.engine.sampling import adjusted_scores
from trm.layers import causal_mask
from trm.model import TRMForCausalLM


@dataclass(frozen=True)
class ReferenceReply:
    """Reply tokens, end token included.

    gaps: by how much each token beat the second best score, or by how little a halting decision was
    made before it, if that is less. steps: supervision steps behind each token.
    """

    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]
    steps: tuple[int, ...]


@torch.inference_mode()
def decode(
    model: TRMForCausalLM,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    end_id: int | None,
    grammar: Grammar | None = None,
) -> ReferenceReply:
    """Decode one prompt, without stop strings. `end_id` None: only `max_tokens` or a grammar ends the reply."""
    reply: list[int] = []
    gaps: list[float] = []
    all_steps: list[int] = []
    for _ in range(params.max_tokens):
        follow = None if grammar is None else _follow(grammar, params, reply)
        if follow is not None and follow.complete:
            break
        tokens = torch.tensor([[*prompt_ids, *reply]], device=model.device)
        if params.halts:
            logits, steps, margin = _halted(model, tokens, params)
        else:
            steps, margin = model.check_effort(params.n_supervision), float("inf")
            logits = model(tokens, n_supervision=steps, logits_to_keep=1, use_cache=False).logits[0, -1]
        scores = adjusted_scores(logits, params, prompt_ids, reply, None if follow is None else follow.mask)
        second, first = np.sort(scores)[-2:]
        gaps.append(min(float(first - second), margin))
        all_steps.append(steps)
        reply.append(int(scores.argmax()))
        if reply[-1] == end_id and not params.ignore_eos:
            break
    return ReferenceReply(tuple(reply), tuple(gaps), tuple(all_steps))


def _follow(grammar: Grammar, params: SamplingParams, reply: Sequence[int]) -> Follow:
    """What may come next, from the beginning each time."""
    matcher = grammar.matcher(may_end=not params.ignore_eos)
    for token in reply:
        matcher.advance(token)
    follow = matcher.follow()
    assert follow.failure is None, follow.failure
    return follow


def _halted(model: TRMForCausalLM, tokens: Tensor, params: SamplingParams) -> tuple[Tensor, int, float]:
    """The last position's logits (V,) at the step where it halts, that step, and by how little that was decided."""
    mask = causal_mask(torch.ones_like(tokens), tokens.shape[1])
    cos, sin = model.backbone.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
    x = model.encode(model.backbone.embed_tokens(tokens), (cos, sin), Sequences(mask))
    context = Sequences(mask, keep=True)
    model.decoder.write_context(x, (cos, sin), context)
    x, rope, context = x[:, -1:], (cos[:, -1:], sin[:, -1:]), context.seen_by(mask[:, :, -1:])
    y, z, answer = torch.zeros_like(x), torch.zeros_like(x), x
    margin, steps = float("inf"), 0
    while steps < model.check_effort(params.n_supervision):
        y, z = model.decoder.step(x, y, z, rope, context)
        steps += 1
        moved = float(model.moved(answer, y))
        probability = float(model.decoder.halt_logits(y).sigmoid())
        answer = y
        tolerance, threshold = params.halt_tolerance or 0.0, params.halt_threshold or 1.0
        margin = min(margin, abs(moved - tolerance), abs(probability - threshold))
        if moved < tolerance or probability > threshold:
            break
    return model.readout(answer)[0, -1], steps, margin
