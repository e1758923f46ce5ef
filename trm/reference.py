"""The oracle: one prompt, no cache, no batch, every token from a pass over the whole sequence.

Slow and obvious. Tests compare `generate()` and the engine with it. It shares the noise and the halting rule with the
engine: what it vouches for is cache, batch, drafts, schedule and sampling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trm.cache import Sequences
from trm.engine.noise import gumbel_noise, stream_key
from trm.engine.request import Follow, Grammar, SamplingParams
from trm.engine.sampling import ENOUGH, WEIGHT_ONE
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
        first, second = scores.topk(2).values.tolist()
        gaps.append(min(first - second, margin))
        all_steps.append(steps)
        reply.append(int(scores.argmax()))
        if reply[-1] == end_id and not params.ignore_eos:
            break
    return ReferenceReply(tuple(reply), tuple(gaps), tuple(all_steps))


def adjusted_scores(
    logits: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    reply: Sequence[int],
    mask: bytes | None = None,
) -> Tensor:
    """Scores (V,), float64, whose argmax is the next token after `prompt_ids` and `reply`.

    logits (V,), which count as float32. The scores are the logits with the penalties, and where a token is sampled,
    over the temperature, filtered, and with noise. Tokens that `mask` leaves out (see `Follow`) are -inf.
    """
    scores = logits.float().double()
    penalty = params.repetition_penalty
    for token in {*prompt_ids, *reply} if penalty != 1 else ():
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(reply) if params.presence_penalty or params.frequency_penalty else ():
        scores[token] -= params.presence_penalty + params.frequency_penalty * list(reply).count(token)
    for token in {token for token, _ in params.logit_bias}:
        scores[token] += sum(bias for other, bias in params.logit_bias if other == token)
    if mask is not None:
        scores[[token for token in range(len(scores)) if not mask[token // 8] >> token % 8 & 1]] = -math.inf
    scores = scores.float()
    if params.temperature == 0:
        return scores.double()
    scaled = (scores - scores.max()) * min(1 / params.temperature, 1e30)
    weights = (scaled.exp() * WEIGHT_ONE).long().tolist()
    total = WEIGHT_ONE / scaled.log_softmax(dim=-1).max().double().exp().item()
    scores = (scores - scores.max()).double() / params.temperature  # a tiny one sends all but the best to -inf
    scores[_excluded(scores.tolist(), weights, total, params)] = -math.inf
    key = stream_key(params.seed, params.sample_index, len(prompt_ids) + len(reply))
    return scores + gumbel_noise(torch.tensor([[key]]), torch.arange(len(scores)))[0].to(scores.device)


def _excluded(scores: Sequence[float], weights: Sequence[int], total: float, params: SamplingParams) -> list[int]:
    """The tokens that top_k, min_p and top_p exclude, in this order.

    weights: their masses, in whole numbers; total: that of all of them, as float32 has it.
    """
    order = sorted(range(len(scores)), key=lambda token: -scores[token])  # of equal ones the lowest comes first
    least = math.log(params.min_p) if params.min_p else -math.inf
    left = [token for token in order[: params.top_k or None] if scores[token] >= least]
    if params.top_p < 1:
        if params.top_k or params.min_p:
            total = sum(weights[token] for token in left)
        enough = params.top_p * ENOUGH * total
        before, left_by_others, left = 0, left, []
        for token in left_by_others:
            if before < enough:
                left.append(token)
            before += weights[token]
    return sorted(set(order) - set(left))


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
    states = model.encode(model.backbone.embed_tokens(tokens), (cos, sin), Sequences(mask))
    context = Sequences(mask, keep=True)
    model.decoder.write_context(states, (cos, sin), context)
    x, rope, context = states[:, -1:, -1], (cos[:, -1:], sin[:, -1:]), context.seen_by(mask[:, :, -1:])
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
