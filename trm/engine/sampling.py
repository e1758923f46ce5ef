"""Choose the next token of one row: a pure function of its logits, parameters and position.

A sampled token is the argmax of the processed logits over the temperature plus Gumbel noise,
and the noise is drawn statelessly from (seed, sample index, position). So the same request
gives the same reply whatever else is decoded beside it, in whatever order.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trm.engine.request import SamplingParams

Scores = npt.NDArray[np.float64]


def adjusted_scores(logits: Tensor, params: SamplingParams, position: int) -> Scores:
    """Scores (V,) whose argmax is the next token: the logits themselves, or the noisy processed ones.

    logits (V,); position: where in the sequence, prompt included, the token will stand.
    """
    scores = logits.double().cpu().numpy()
    if params.temperature == 0:
        return scores
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf
        scores = (scores - scores.max()) / params.temperature
    return _filtered(scores, params) + gumbel_noise(len(scores), params.seed, params.sample_index, position)


def choose(logits: Tensor, params: SamplingParams, position: int) -> int:
    """The next token."""
    if params.temperature == 0:
        return int(logits.argmax())
    return int(adjusted_scores(logits, params, position).argmax())


def gumbel_noise(size: int, seed: int, sample_index: int, position: int) -> Scores:
    """Standard Gumbel noise (size,), a function of its arguments alone.

    Philox counts in its low words; the position in the highest keeps every stream apart from the others.
    """
    generator = np.random.Philox(key=np.array([seed, sample_index], dtype=np.uint64), counter=[0, 0, 0, position])
    uniform = ((generator.random_raw(size) >> 11) + 0.5) * 2.0**-53  # strictly between 0 and 1
    return np.asarray(-np.log(-np.log(uniform)), dtype=np.float64)


def _filtered(scores: Scores, params: SamplingParams) -> Scores:
    """Remove the tokens that top_k, min_p and top_p exclude, in this order, by setting them to -inf."""
    kept = np.ones(len(scores), dtype=bool)
    if 0 < params.top_k < len(scores):
        kept &= scores >= np.partition(scores, -params.top_k)[-params.top_k]
    if params.min_p > 0:
        kept &= scores >= scores.max() + np.log(params.min_p)
    if params.top_p < 1:
        order = np.argsort(-np.where(kept, scores, -np.inf), kind="stable")
        weights = np.exp(scores[order] - scores.max()) * kept[order]
        before = np.cumsum(weights) - weights  # mass of the better tokens
        kept[order[before >= params.top_p * weights.sum()]] = False
    return np.where(kept, scores, -np.inf)
