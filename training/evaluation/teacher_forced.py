"""What every supervision step makes of the problems' own solutions: loss, halting head, when a token might halt.

Teacher-forced: each token is predicted from the tokens of the solution before it, not from the model's own.

Legend: M labels of all problems, N supervision steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from training.batches import collate
from training.evaluation.statistics import ratio_interval, wilson_interval
from training.loss import prepare
from trm import TRMConfig, TRMForCausalLM
from trm.chat import ChatFormat, Example
from trm.model import variation

MAX_LOGITS = 2**26  # numbers in one batch's logits: 256 MB
MAX_BATCH = 32
NUM_BINS = 10  # of the reliability diagram
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
TOLERANCES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Measured:
    """Every label at every step. Step 0, the backbone's own answer, is the first of the N + 1 rows.

    problem (M,): which problem a label belongs to. loss, token, right (N + 1, M): cross-entropy in nats, the likeliest
    token, whether it is the label. halt, moved (N, M): the halting head's probability, and how far the probabilities
    moved in that step (total variation).
    """

    problem: Tensor
    loss: Tensor
    token: Tensor
    right: Tensor
    halt: Tensor
    moved: Tensor


@torch.inference_mode()
def measure(model: TRMForCausalLM, chat: ChatFormat, examples: Sequence[Example], num_steps: int) -> Measured:
    """Run the recursion `num_steps` deep over the replies of all examples."""
    longest = max(len(example.ids) - example.label_start for example in examples)
    size = max(1, min(MAX_BATCH, MAX_LOGITS // (longest * model.config.vocab_size)))
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    parts: list[list[Tensor]] = []
    for start in tqdm(range(0, len(order), size), desc="teacher-forced", unit="batch"):
        chosen = order[start : start + size]
        batch = collate([examples[i] for i in chosen], chat.tokenizer.pad_token_id or 0)
        prepared = prepare(model, batch.to(model.device))
        key_values = prepared.key_values(model)
        rows, places = prepared.answers.unbind(1)
        targets = prepared.targets[-1]
        y = z = torch.zeros_like(prepared.x)
        before = model.readout(prepared.x[rows, places])
        steps = [_read(before, targets)]
        halt, moved = [], []
        for _ in range(num_steps):
            y, z = model.decoder.step(prepared.x, y, z, prepared.query_rope, key_values)
            answer = y[rows, places]
            logits = model.readout(answer)
            steps.append(_read(logits, targets))
            halt.append(model.decoder.halt_logits(answer).float().sigmoid())
            moved.append(variation(before, logits))
            before = logits
        loss, token, right = (torch.stack(column).cpu() for column in zip(*steps, strict=True))
        problem = torch.tensor(chosen)[rows.cpu()]
        parts.append([problem, loss, token, right, torch.stack(halt).cpu(), torch.stack(moved).cpu()])
    return Measured(*(torch.cat(part, dim=-1) for part in zip(*parts, strict=True)))


def summarize(measured: Measured, config: TRMConfig) -> dict[str, Any]:
    """The report's part. What halting would cost is left out where the engine refuses it: keys from the state."""
    trained = config.n_supervision
    parts: dict[str, Any] = {
        "n": int(measured.problem.max()) + 1,
        "loss_per_step": loss_per_step(measured),
        "calibration": calibration(measured, trained),
    }
    if config.kv_source == "context" and trained > 1:
        parts["halting"] = halting_trade_off(measured, trained)
    return {"teacher_forced": parts}


def loss_per_step(measured: Measured) -> list[dict[str, Any]]:
    """Mean loss per token and share of tokens right, step 0 first; intervals are over problems."""
    problems = int(measured.problem.max()) + 1
    counts = torch.bincount(measured.problem, minlength=problems).tolist()
    rows = []
    for step, (loss, right) in enumerate(zip(measured.loss, measured.right, strict=True)):
        sums = torch.bincount(measured.problem, loss.double(), problems).tolist()
        hits = torch.bincount(measured.problem, right.double(), problems).tolist()
        rows.append(
            {
                "step": step,
                "loss": sum(sums) / sum(counts),
                "interval": list(ratio_interval(sums, counts)),
                "token_accuracy": sum(hits) / sum(counts),
                "token_accuracy_interval": list(ratio_interval(hits, counts)),
            }
        )
    return rows


def calibration(measured: Measured, effort: int) -> dict[str, Any]:
    """The halting head's probability in bins of equal width against the share of tokens right, steps 1 to `effort`.

    error: mean distance between the two, weighted by tokens (the expected calibration error).
    """
    halt, right = measured.halt[:effort].flatten(), measured.right[1 : effort + 1].flatten()
    places = (halt * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    bins = []
    error = 0.0
    for index in range(NUM_BINS):
        inside = places == index
        if count := int(inside.sum()):
            predicted, hits = halt[inside].mean().item(), int(right[inside].sum())
            error += abs(predicted - hits / count) * count / len(halt)
            interval = list(wilson_interval(hits, count))
            bins.append({"predicted": predicted, "observed": hits / count, "interval": interval, "tokens": count})
    return {"steps": effort, "error": error, "bins": bins}


def halting_trade_off(measured: Measured, effort: int) -> dict[str, Any]:
    """For each rule of halting: mean steps, and how often the token is that of `effort` steps, or the solution's."""
    never = torch.zeros(effort, len(measured.problem), dtype=torch.bool)
    fixed = []
    for step in range(effort):
        halted = never.clone()
        halted[step] = True
        fixed.append({"steps": step + 1} | _halted(measured, halted))
    halt, moved = measured.halt[:effort], measured.moved[:effort]
    return {
        "effort": effort,
        "head": [{"threshold": limit} | _halted(measured, halt > limit) for limit in THRESHOLDS],
        "movement": [{"tolerance": limit} | _halted(measured, moved < limit) for limit in TOLERANCES],
        "fixed": fixed,
    }


def _halted(measured: Measured, halted: Tensor) -> dict[str, Any]:
    """What comes of halting each token at the first step where `halted` (steps, M) is true, or else at the last."""
    last = torch.ones_like(halted[:1])
    at = torch.cat([halted[:-1], last]).int().argmax(0, keepdim=True)
    token, right = measured.token[1 : len(halted) + 1], measured.right[1 : len(halted) + 1]
    agreeing, tokens = int((token.gather(0, at) == token[-1]).sum()), at.shape[1]
    return {
        "mean_steps": int(at.sum()) / tokens + 1,
        "agreement": agreeing / tokens,
        "interval": list(wilson_interval(agreeing, tokens)),
        "token_accuracy": int(right.gather(0, at).sum()) / tokens,
    }


def _read(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, likeliest token, and whether that is the target, each (M,), from logits (M, V)."""
    logits = logits.float()
    token = logits.argmax(-1)
    return F.cross_entropy(logits, targets, reduction="none"), token, token == targets
