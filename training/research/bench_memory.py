"""Measure what an optimiser step needs in memory: `python -m training.research.bench_memory [flags of trm-train]`.

Both ways of gradient, batches of 8 and 32, 2, 4 and 16 supervision steps; each in a process of its own, on the
CPU. A table, then one JSON line.
"""

import json
import multiprocessing
import resource
from collections.abc import Callable
from itertools import product
from typing import Any, ClassVar

import torch
from torch.profiler import ProfilerActivity, profile

from training.building import model_settings
from training.config import TrainSettings
from training.problems.data import encode_problems, load_problems
from training.trainer import Trainer
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.chat import ChatFormat
from trm.settings import run_command

BATCH_SIZES = (8, 32)
DEPTHS = (2, 4, 16)


class MemorySettings(TrainSettings):
    """Measure the memory of training with these flags of trm-train, at several depths and batch sizes."""

    command: ClassVar[str] = "python -m training.research.bench_memory"


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest sum of CPU tensors that `work` makes and that are alive at once, as the allocator counts it.

    What was alive before and is freed by `work` is not subtracted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def measure_passes(trainer: Trainer) -> int:
    """Bytes that a fresh trainer's first two passes over a batch need beyond weights and average.

    A pass is one optimiser step with full gradient, one per supervision step with the paper's. The second finds
    the optimiser's states in memory.
    """
    return peak_bytes(lambda: [trainer.train_step() for _ in range(2 * trainer.feed.steps_per_group)])


def measure_run(settings: TrainSettings) -> dict[str, Any]:
    """One row of the table: a run on one batch of problems, twice."""
    torch.set_num_threads(settings.num_threads or torch.get_num_threads())
    source = settings.backbone or str(bundled_model_path())
    chat = ChatFormat(checkpoint.read_tokenizer(source, settings.backbone_revision))
    dtype = torch.bfloat16 if settings.backbone_dtype == "bfloat16" else torch.float32
    backbone = checkpoint.read_backbone(source, settings.backbone_revision, dtype)
    problems = load_problems(settings.dataset or "synthetic", split="train", seed=0, num_problems=settings.batch_size)
    examples = encode_problems(
        problems[: settings.batch_size], chat, settings.max_length, settings.replies, settings.step_targets
    )

    def fresh() -> Trainer:
        model = TRMForCausalLM.from_backbone(backbone, **model_settings(settings))
        return Trainer(settings, model, chat, examples, "cpu")

    trainer = fresh()
    for _ in range(2 * trainer.feed.steps_per_group):
        trainer.train_step()
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before counting, which takes memory
    return {
        "gradient": settings.gradient,
        "batch_size": len(examples),
        "n_supervision": settings.n_supervision,
        "carry_bytes": 2 * trainer.feed.prepared[0].x.numel() * 4,
        "step_bytes": measure_passes(fresh()),
        "peak_rss_bytes": peak_rss_bytes,
    }


def main() -> None:
    """Parse, measure, print."""
    settings = MemorySettings.from_command_line()
    cells = [
        settings.model_copy(update={"gradient": g, "batch_size": b, "n_supervision": n, "epochs": 2})
        for g, b, n in product(("full", "paper"), BATCH_SIZES, DEPTHS)
    ]
    rows = []
    print("gradient  batch  N_sup  (y, z) MB  step MB  process MB")  # noqa: T201 - the command's result
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for row in pool.imap(measure_run, cells):
            megabytes = [row[name] / 1e6 for name in ("carry_bytes", "step_bytes", "peak_rss_bytes")]
            print(  # noqa: T201
                f"{row['gradient']:8} {row['batch_size']:6} {row['n_supervision']:6} "
                f"{megabytes[0]:10.2f} {megabytes[1]:8.1f} {megabytes[2]:11.0f}",
                flush=True,
            )
            rows.append(row)
    print(json.dumps(rows))  # noqa: T201


if __name__ == "__main__":
    run_command(main, MemorySettings.command)
