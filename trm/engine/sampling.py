"""Choose the next token of one row: a pure function of its logits, its parameters and the tokens before.

A sampled token is the argmax of the processed logits over the temperature plus Gumbel noise,
and the noise is drawn statelessly from (seed, sample index, position). So the same request
gives the same reply whatever else is decoded beside it, in whatever order.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trm.engine.request import Candidates, SamplingParams, TokenLogprobs

Scores = npt.NDArray[np.float64]


def adjusted_scores(
    logits: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    reply: Sequence[int],
    mask: bytes | None = None,
) -> Scores:
    """Scores (V,) whose argmax is the next token after `prompt_ids` and `reply`.

    logits (V,). The scores are the logits with the penalties, and where a token is sampled, filtered,
    over the temperature, and with noise. Tokens that `mask` leaves out (see `Follow`) are -inf from the start.
    """
    scores = logits.double().cpu().numpy()
    if mask is not None:
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(scores), bitorder="little")
        scores = np.where(bits, scores, -np.inf)
    if params.edits_logits:
        scores = _edited(scores, params, prompt_ids, reply)
    if params.temperature == 0:
        return scores
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf
        scores = (scores - scores.max()) / params.temperature
    position = len(prompt_ids) + len(reply)
    return _filtered(scores, params) + gumbel_noise(len(scores), params.seed, params.sample_index, position)


def choose(
    logits: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    reply: Sequence[int],
    mask: bytes | None = None,
) -> int:
    """The next token."""
    if params.plain_greedy and mask is None:
        return int(logits.argmax())
    return int(adjusted_scores(logits, params, prompt_ids, reply, mask).argmax())


def token_logprobs(logits: Tensor, token: int, num_top: int) -> TokenLogprobs:
    """Log probabilities of `token` and of the `num_top` likeliest tokens under the model's own logits (V,)."""
    logprobs = logits.float().log_softmax(dim=-1)
    return TokenLogprobs(float(logprobs[token]), _likeliest(logprobs, num_top))


def candidates(logits: Tensor, num: int) -> Candidates:
    """The `num` likeliest tokens under the model's own logits (V,)."""
    return _likeliest(logits.float().log_softmax(dim=-1), num)


def gumbel_noise(size: int, seed: int, sample_index: int, position: int) -> Scores:
    """Standard Gumbel noise (size,), a function of its arguments alone.

    Philox counts in its low words; the position in the highest keeps every stream apart from the others.
    """
    generator = np.random.Philox(key=np.array([seed, sample_index], dtype=np.uint64), counter=[0, 0, 0, position])
    uniform = ((generator.random_raw(size) >> 11) + 0.5) * 2.0**-53  # strictly between 0 and 1
    return np.asarray(-np.log(-np.log(uniform)), dtype=np.float64)


def _likeliest(logprobs: Tensor, num: int) -> Candidates:
    top = logprobs.topk(num)
    return tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _edited(scores: Scores, params: SamplingParams, prompt_ids: Sequence[int], reply: Sequence[int]) -> Scores:
    """Scores with the penalties for tokens that have occurred, then with the bias."""
    scores = scores.copy()
    if params.repetition_penalty != 1:
        seen = np.unique([*prompt_ids, *reply])
        scores[seen] *= np.where(scores[seen] > 0, 1 / params.repetition_penalty, params.repetition_penalty)
    if reply and (params.presence_penalty or params.frequency_penalty):
        repeated, counts = np.unique(reply, return_counts=True)
        scores[repeated] -= params.presence_penalty + params.frequency_penalty * counts
    for token, bias in params.logit_bias:
        scores[token] += bias
    return scores


def _filtered(scores: Scores, params: SamplingParams) -> Scores:
    """Remove the tokens that top_k, min_p and top_p exclude, in this order, by setting them to -inf."""
    kept = np.ones(len(scores), dtype=bool)
    if 0 < params.top_k < len(scores):
        kept &= scores >= np.partition(scores, -params.top_k)[-params.top_k]
    if params.min_p > 0:
        kept &= scores >= scores.max() + np.log(params.min_p)
    if params.top_p < 1:
        weights = np.exp(scores - scores.max()) * kept
        total = weights.sum()
        # All tokens lighter than this have a mass of less than 1 - top_p together: no need to sort them.
        kept &= weights > (1 - params.top_p) * total / len(weights)
        candidates = np.flatnonzero(kept)
        order = candidates[np.argsort(-scores[candidates], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]  # mass of the better tokens
        kept[order[before >= params.top_p * total]] = False
    return np.where(kept, scores, -np.inf)
