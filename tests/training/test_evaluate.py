"""Evaluation: explicit effort, honest intervals, the numbers that the report claims."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.config import EvalSettings, PretrainSettings, TrainSettings
from training.evaluate import evaluate_model, paired, wilson_interval
from training.pretrain import pretrain
from training.run import train
from trm import checkpoint
from trm.errors import ConfigError


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (450, 500, 0.8706, 0.9233)],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_paired_comparison() -> None:
    ours, theirs = [True] * 9 + [False] * 3, [True] * 3 + [False] * 8 + [True]

    assert paired(ours, theirs) == {"wins": 6, "losses": 1, "p": pytest.approx(2 * 8 / 128)}
    assert paired(theirs, ours)["p"] == paired(ours, theirs)["p"]
    assert paired(ours, ours) == {"wins": 0, "losses": 0, "p": 1.0}


def test_report(settings: Callable[..., TrainSettings], tmp_path: Path) -> None:
    model = str(train(settings(max_steps=1)))
    arguments = {"model": model, "dataset": "synthetic:easy", "limit": 7, "max_tokens": 6, "num_threads": 1}

    report = evaluate_model(EvalSettings(**arguments, report=tmp_path / "out"))

    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert report["n"] == 7
    assert [row["effort"] for row in report["efforts"]] == [0, 1, 3]  # the baseline, one step, the trained depth
    assert report["trained_effort"] == 3
    for row in report["efforts"]:
        assert row["accuracy"] == row["correct"] / 7
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    assert report["efforts"][0]["against_backbone"] == {"wins": 0, "losses": 0, "p": 1.0}
    with pytest.raises(ConfigError, match="--effort 17: this model takes 0 to 16"):
        evaluate_model(EvalSettings(**arguments, effort=[17]))
    with pytest.raises(ConfigError, match=r"need .* positions; the model has 1024"):
        evaluate_model(EvalSettings(**(arguments | {"max_tokens": 1024})))


def test_pretraining_writes_a_backbone_that_trains_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole chain from nothing, in miniature."""
    monkeypatch.setattr("training.pretrain.TOKENIZER_PROBLEMS", 200)
    monkeypatch.setattr("training.pretrain.NUM_TEST_PROBLEMS", 2)
    monkeypatch.setattr("training.pretrain.NUM_EVALUATIONS", 1)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"question": "One and one?", "answer": "1+1=2\n#### 2"}) + "\n")
    backbone = tmp_path / "backbone"
    small = {"max_steps": 10, "batch_size": 4, "hidden_size": 64, "num_layers": 1, "vocab_size": 400, "num_threads": 1}

    pretrain(PretrainSettings(output_dir=backbone, text_file=text, **small))
    record = json.loads((backbone / "pretrain.json").read_text())
    last = train(
        TrainSettings(
            dataset="synthetic:have", num_problems=4, backbone=str(backbone), output_dir=tmp_path / "run", n_latent=1,
            n_cycles=1, n_supervision=2, num_threads=1,
        )
    )  # fmt: skip

    assert record["curve"][-1]["step"] == 10
    assert {t.dtype for t in checkpoint.read_tensors(backbone / "model.safetensors").values()} == {torch.bfloat16}
    report = evaluate_model(EvalSettings(model=str(last), dataset=str(text), limit=1, max_tokens=4, num_threads=1))
    assert report["n"] == 1
