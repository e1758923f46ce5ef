"""What a training step needs in memory as the recursion gets deeper, to the byte, as the allocator counts it."""

from collections.abc import Callable

import pytest
import torch

from training.building import model_settings
from training.config import TrainSettings
from training.problems.data import encode_problems, load_problems
from training.research.bench_memory import measure_passes, peak_bytes
from training.trainer import Trainer
from trm import TRMForCausalLM, checkpoint
from trm.chat import ChatFormat

pytestmark = pytest.mark.slow

DEPTHS = (2, 4, 8)


def make_trainer(settings: TrainSettings) -> Trainer:
    chat = ChatFormat(checkpoint.read_tokenizer(str(settings.backbone)))
    problems = load_problems(str(settings.dataset), split="train", seed=0, num_problems=settings.batch_size)
    backbone = checkpoint.read_backbone(str(settings.backbone))
    model = TRMForCausalLM.from_backbone(backbone, **model_settings(settings))
    return Trainer(settings, model, chat, encode_problems(problems, chat, settings.max_length), "cpu")


def test_the_peak_counts_what_is_alive_at_once() -> None:
    def work() -> None:
        first = torch.ones(1000)
        second = first + 1  # 8,000 bytes
        del first
        second.sum()

    assert peak_bytes(work) == pytest.approx(8000, abs=200)
    assert peak_bytes(work) == peak_bytes(work)


def passes(settings: Callable[..., TrainSettings], n_supervision: int, **changes: str) -> tuple[int, int]:
    """The peak, and the bytes of one (y, z)."""
    small = {"batch_size": 4, "epochs": 2, "n_latent": 1, "autocast": "off"}
    trainer = make_trainer(settings(n_supervision=n_supervision, **(small | changes)))
    return measure_passes(trainer), 2 * trainer.feed.prepared[0].x.numel() * 4


def test_with_full_gradient_a_step_more_costs_its_states_only(
    settings: Callable[..., TrainSettings], kv_source: str
) -> None:
    peaks, carry = zip(*(passes(settings, n, gradient="full", kv_source=kv_source) for n in DEPTHS), strict=True)

    growth = [(more - less) / step for less, more, step in zip(peaks, peaks[1:], (2, 4), strict=False)]
    assert min(growth) > 0
    assert max(growth) <= 1.5 * carry[0], growth


def test_with_the_papers_gradient_depth_costs_nothing(settings: Callable[..., TrainSettings], kv_source: str) -> None:
    peaks = {passes(settings, n, gradient="paper", kv_source=kv_source)[0] for n in DEPTHS}

    assert len(peaks) == 1
