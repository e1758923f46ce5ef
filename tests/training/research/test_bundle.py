"""The whole build of the bundled model, in miniature: what it leaves behind, and what it does not do twice."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from training.checkpoints import RUN_JSON, step_of
from training.config import PretrainSettings
from training.research import bundle
from trm import TRMForCausalLM, bundled_model_path

pytestmark = pytest.mark.slow


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"max_steps": 6, "batch_size": 4, "hidden_size": 64, "num_layers": 1, "vocab_size": 400}
    monkeypatch.setattr(bundle, "PretrainSettings", partial(PretrainSettings, **small))
    monkeypatch.setattr("training.pretrain.TOKENIZER_PROBLEMS", 200)
    monkeypatch.setattr("training.pretrain.NUM_TEST_PROBLEMS", 2)
    monkeypatch.setattr("training.pretrain.NUM_EVALUATIONS", 1)
    monkeypatch.setattr("training.research.controls.COUNTED_STEPS", 2)
    tiny = {"num_problems": 16, "batch_size": 4, "context_layers": [0, 1], "lr": 1e-3}
    monkeypatch.setattr(bundle, "RUNS", {name: run | tiny for name, run in bundle.RUNS.items()})
    evaluations = {"at once": ("synthetic:mental", 12, [0, 2, 6]), "worked": ("synthetic", 3, [0, 6])}
    monkeypatch.setattr(bundle, "EVALUATIONS", evaluations)
    monkeypatch.setattr(bundle, "MAX_TOKENS", 6)


def test_a_build_leaves_a_model_with_reports_and_card_and_then_its_controls(
    miniature: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gsm8k = tmp_path / "validation.jsonl"
    gsm8k.write_text(json.dumps({"question": "One and one?", "answer": "1+1=2\n#### 2"}) + "\n")
    work, target = tmp_path / "work", tmp_path / "bundled"

    bundle.build(work, None, gsm8k, target)

    assert TRMForCausalLM.from_pretrained(target).config.n_supervision == 6
    reports = json.loads((target / "report.json").read_text())
    assert set(reports) == {"at once", "worked", "gsm8k"}
    for report in reports.values():
        assert report["baseline"]["accuracy"] == report["efforts"][0]["accuracy"]
    card = (target / "README.md").read_text()
    assert "| effort 6 |" in card
    assert "| right, by operations (problems) | 1 (" in card
    assert "control" not in card
    for name in ("backbone/model.safetensors", "pretrain.json", "training.json", *bundle.PICTURES):
        assert (target / name).is_file()

    bundle.compare(work / "controls", target)

    compared = json.loads((target / "report.json").read_text())
    for name in bundle.COMPARED:
        assert compared[name]["efforts"][0]["correct"] == reports[name]["efforts"][0]["correct"]
        controls = compared[name]["controls"]
        assert [control["name"] for control in controls] == [*bundle.CONTROLS]
        assert [control["mean_steps"] for control in controls] == [0, 0, 0, 6]
        assert all({"accuracy", "mcnemar_p"} <= set(control) for control in controls)
    card_with_controls = (target / "README.md").read_text()
    assert all(card_with_controls.count(f"| {name} (control) |") == 3 for name in bundle.CONTROLS.values())
    written = card_with_controls + (target / "report.json").read_text() + (target / "config.json").read_text()
    assert str(tmp_path) not in written

    for stage in ("pretrain", "train", "train_control"):
        monkeypatch.setattr(bundle, stage, None)  # what is finished is not done again
    bundle.build(work, None, gsm8k, target)
    assert (target / "README.md").read_text() == card
    bundle.compare(work / "controls", target)
    assert (target / "README.md").read_text() == card_with_controls


def test_nothing_is_built_on_a_run_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def stopped() -> Iterator[threading.Event]:
        event = threading.Event()
        event.set()
        yield event

    tiny = {"num_problems": 16, "batch_size": 4, "lr": 1e-3}
    monkeypatch.setattr(bundle, "RUNS", {name: run | tiny for name, run in bundle.RUNS.items()})
    with monkeypatch.context() as signalled:
        signalled.setattr("training.run.stop_on_signals", stopped)
        for _ in range(2):  # begun, then carried on
            with pytest.raises(SystemExit, match="decoder was stopped; the same command goes on"):
                bundle.train_decoder(bundled_model_path(), tmp_path)
    assert not (tmp_path / "deeper").exists()

    last = bundle.train_decoder(bundled_model_path(), tmp_path)

    assert (last.parent.name, step_of(last)) == ("deeper", 4)
    begun = json.loads((last.parent / RUN_JSON).read_text())["settings"]["init_from"]
    assert step_of(Path(begun)) == 4
