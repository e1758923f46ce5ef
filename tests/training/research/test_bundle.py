"""The whole build of the bundled model, in miniature: what it leaves behind, and what it does not do twice."""

import json
from functools import partial
from pathlib import Path

import pytest

from training.config import PretrainSettings
from training.research import bundle
from trm import TRMForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"max_steps": 6, "batch_size": 4, "hidden_size": 64, "num_layers": 1, "vocab_size": 400}
    monkeypatch.setattr(bundle, "PretrainSettings", partial(PretrainSettings, **small))
    monkeypatch.setattr("training.pretrain.TOKENIZER_PROBLEMS", 200)
    monkeypatch.setattr("training.pretrain.NUM_TEST_PROBLEMS", 2)
    monkeypatch.setattr("training.pretrain.NUM_EVALUATIONS", 1)
    monkeypatch.setattr("training.research.controls.COUNTED_STEPS", 2)
    monkeypatch.setattr(bundle, "DECODER", bundle.DECODER | {"num_problems": 16, "batch_size": 4})
    monkeypatch.setattr(bundle, "EVALUATIONS", {"all": ("synthetic", 3, [0, 4])})
    monkeypatch.setattr(bundle, "MAX_TOKENS", 6)


def test_a_build_leaves_a_model_with_its_control_reports_and_card(
    miniature: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gsm8k = tmp_path / "validation.jsonl"
    gsm8k.write_text(json.dumps({"question": "One and one?", "answer": "1+1=2\n#### 2"}) + "\n")
    target = tmp_path / "bundled"

    bundle.build(tmp_path / "work", None, gsm8k, target)

    assert TRMForCausalLM.from_pretrained(target).config.n_supervision == 4
    reports = json.loads((target / "report.json").read_text())
    assert set(reports) == {"all", "gsm8k"}
    for report in reports.values():
        assert report["baseline"]["accuracy"] == report["efforts"][0]["accuracy"]
        assert {"accuracy", "mcnemar_p", "compute"} <= set(report["control"])
    card = (target / "README.md").read_text()
    assert "| effort 4 |" in card
    assert "backbone trained on (control)" in card
    assert str(tmp_path) not in card + (target / "report.json").read_text() + (target / "config.json").read_text()
    for name in ("control/model.safetensors", "backbone/model.safetensors", "pretrain.json", *bundle.PICTURES):
        assert (target / name).is_file()

    for stage in ("pretrain", "train", "train_control"):
        monkeypatch.setattr(bundle, stage, None)  # what is finished is not done again
    bundle.build(tmp_path / "work", None, gsm8k, target)
    assert (target / "README.md").read_text() == card
