"""Problems that a run never trains on, and what its averaged weights lose on them."""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from training.batches import IGNORE_INDEX, collate
from training.config import TrainSettings
from training.loss import prepare, token_losses
from training.optim import EMA
from training.problems.data import load_problems
from training.problems.problem import Problem
from training.states import States
from trm.model import TRMForCausalLM

logger = logging.getLogger(__name__)

MAX_SHARE = 10  # at most one row in this many is taken out of the training data
SEED_OFFSET = 2**32  # synthetic problems unlike those that trm-eval draws with the same seed


@dataclass(frozen=True)
class Validation:
    """Mean loss and token accuracy per label after each supervision step, by what that step learns."""

    losses: list[float]
    token_accuracies: list[float]


def split_problems(settings: TrainSettings, problems: Sequence[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Training and validation problems: the latter from `--validation`, the synthetic held-out split, or the data."""
    count = settings.validation_problems
    is_synthetic = str(settings.dataset).partition(":")[0] == "synthetic"
    if not count:
        return list(problems), []
    if settings.validation is None and not is_synthetic:
        return hold_out(problems, count, settings.seed)
    rows = load_problems(
        settings.validation or str(settings.dataset),
        split="heldout",
        seed=settings.seed + SEED_OFFSET,
        num_problems=count,
        keep_annotations=settings.keep_annotations,
        flag="--validation",
    )
    chosen = _sample(rows, count, settings.seed)
    questions = {problem.question for problem in problems}
    if trained_on := sum(problem.question in questions for problem in chosen):
        logger.warning(
            "--validation: %d of %d problems are training problems, too; their loss says nothing of unseen ones",
            trained_on,
            len(chosen),
        )
    return list(problems), chosen


def hold_out(problems: Sequence[Problem], count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Take `count` problems out, at most a tenth of them, and every other row with one of their questions."""
    chosen = _sample(problems, min(count, len(problems) // MAX_SHARE), seed)
    questions = {problem.question for problem in chosen}
    kept = [problem for problem in problems if problem.question not in questions]
    return (kept, chosen) if kept else (list(problems), [])


@torch.no_grad()
def measure(model: TRMForCausalLM, states: States, batch_size: int, pad_id: int) -> Validation:
    """Losses of the model as it stands on the examples of `states`, in batches of similar length, on its own device."""
    examples = states.examples
    steps = model.config.n_supervision
    sums, labels = torch.zeros(2, steps, dtype=torch.float64), torch.zeros(steps)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        batch = collate([examples[i] for i in rows], pad_id).to(model.device)
        prepared = prepare(model, batch, states.padded(rows, batch.input_ids.shape[1]))
        y = z = torch.zeros_like(prepared.x)
        key_values = prepared.key_values(model)
        for step in range(steps):
            y, z = model.decoder.step(prepared.x, y, z, prepared.query_rope, key_values)
            tokens = token_losses(model, y, prepared, step)
            sums[:, step] += torch.stack([tokens.cross_entropy.double().sum(), tokens.right.sum()]).cpu()
            labels[step] += int((prepared.step_targets(step)[0] != IGNORE_INDEX).sum())
    losses, right = (sums / labels).tolist()
    return Validation(losses, right)


@contextmanager
def averaged(ema: EMA) -> Iterator[None]:
    """Within the block the parameters hold their averages; nothing is copied, so nothing is rounded."""

    def swap() -> None:
        for name, parameter in ema.parameters.items():
            parameter.data, ema.average[name] = ema.average[name], parameter.data

    swap()
    try:
        yield
    finally:
        swap()


def _sample(problems: Sequence[Problem], count: int, seed: int) -> list[Problem]:
    chosen = random.Random(f"{seed}/validation").sample(range(len(problems)), min(count, len(problems)))
    return [problems[index] for index in sorted(chosen)]
