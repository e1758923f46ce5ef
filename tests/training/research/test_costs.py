"""The arithmetic of costs against what is really computed and kept."""

from collections.abc import Callable

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.training.research.test_bench_memory import make_trainer
from tests.training.test_hub_backbone import CONFIG
from training.config import TrainSettings
from training.research.costs import batch_sizes, operations, weights
from trm.config import TRMConfig


@pytest.mark.parametrize("train_lm_head", [False, True], ids=["frozen head", "own head"])
@pytest.mark.parametrize("gradient", ["full", "paper"])
def test_operations_are_those_that_torch_counts(
    settings: Callable[..., TrainSettings], gradient: str, kv_source: str, train_lm_head: bool
) -> None:
    few = {"batch_size": 6, "epochs": 2, "n_supervision": 4, "autocast": "off"}
    trainer = make_trainer(settings(gradient=gradient, kv_source=kv_source, train_lm_head=train_lm_head, **few))

    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):  # a fused kernel is not counted
        for _ in range(trainer.feed.steps_per_group):
            trainer.train_step()

    sizes = batch_sizes(trainer.feed.examples, 6, 0, kv_source)
    expected = operations(trainer.model.config, sizes, gradient, train_lm_head)
    assert counted.get_total_flops() == pytest.approx(expected.total, rel=0.03)  # backbone: examples are not padded


def test_weights_of_the_documented_backbone() -> None:
    """1,543,714,304, as its model card counts them; what is trained is 64 times less."""
    config = {name: value for name, value in CONFIG.items() if name not in ("torch_dtype", "architectures")}

    assert weights(TRMConfig(backbone_config=config)) == (1_543_714_304, 24_380_929)
