"""The whole build of the bundled model, in miniature: what it leaves behind, and what it does not do twice."""

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.training.miniature import SMALL, shrink
from tests.training.together import in_two_processes
from training import pretrain
from training.checkpoints import RUN_JSON, step_of
from training.config import PretrainSettings, TrainSettings
from training.directories import claim
from training.research import bundle
from training.research.controls import CONTROL_JSON
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)


def on_bundled(**changes: Any) -> dict[str, dict[str, Any]]:
    """The recipe's runs, in miniature, for the backbone of the model that ships."""
    return {name: run | {"context_layers": [0, 2, 4]} | changes for name, run in bundle.RUNS.items()}


def test_a_build_leaves_a_model_with_reports_and_card_and_then_its_controls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gsm8k = tmp_path / "validation.jsonl"
    gsm8k.write_text(json.dumps({"question": "One and one?", "answer": "1+1=2\n#### 2"}) + "\n")
    work, target = tmp_path / "work", tmp_path / "bundled"
    command = "tests.training.miniature", str(target), "--work-dir", str(work)

    in_two_processes(*command, "--gsm8k-validation", str(gsm8k))

    assert TRMForCausalLM.from_pretrained(target).config.n_supervision == 6
    reports = json.loads((target / "report.json").read_text())
    assert set(reports) == {"at once", "worked", "gsm8k"}
    for report in reports.values():
        assert report["baseline"]["accuracy"] == report["efforts"][0]["accuracy"]
    card = (target / "README.md").read_text()
    assert "| effort 6 |" in card
    assert "| right, by operations (problems) | 1 (" in card
    assert "(control)" not in card
    for name in ("backbone/model.safetensors", "pretrain.json", "training.json", *bundle.PICTURES):
        assert (target / name).is_file()

    in_two_processes(*command, "--controls")

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

    alone = bundle.PretrainSettings(output_dir=tmp_path / "alone", device="cpu", num_threads=1)
    bundle.pretrain(alone)  # in one process
    backbones = next(work.glob("backbone-*")), tmp_path / "alone"
    curves = [json.loads((d / "pretrain.json").read_text())["curve"] for d in backbones]
    assert [point["tokens"] for point in curves[0]] == [point["tokens"] for point in curves[1]]
    assert curves[0][-1]["loss"] == pytest.approx(curves[1][-1]["loss"], rel=1e-3)
    costs = json.loads(next(work.glob("controls-*/layer")).joinpath(CONTROL_JSON).read_text())
    runs = [TrainSettings(**run, backbone=str(target)) for run in bundle.RUNS.values()]
    layer = json.loads((bundle.train_control("layer", runs, tmp_path / "layer") / CONTROL_JSON).read_text())
    assert costs == layer  # the operations of both processes were counted, and each once

    for stage in ("pretrain", "train", "train_control"):
        monkeypatch.setattr(bundle, stage, None)  # what is finished is not done again
    bundle.build(work, None, gsm8k, target)
    assert (target / "README.md").read_text() == card
    bundle.compare(work, target)
    assert (target / "README.md").read_text() == card_with_controls


@pytest.mark.parametrize(
    ("asked", "flags"),
    [
        ([], "--backbone trm/bundled --gsm8k-validation {0}/validation.jsonl"),
        (["BACKBONE=runs/other"], "--backbone runs/other --gsm8k-validation {0}/validation.jsonl"),
        (["BACKBONE=new"], "--text-file {0}/train.jsonl --gsm8k-validation {0}/validation.jsonl"),
        (["BACKBONE=new", "GSM8K={0}/missing"], ""),
        (["GSM8K={0}/missing"], "--backbone trm/bundled"),
    ],
)
def test_make_model_stands_on_the_backbone_that_ships_or_on_a_new_one(
    tmp_path: Path, asked: list[str], flags: str
) -> None:
    command = ["make", "--dry-run", f"GSM8K={tmp_path}", "model", *(word.format(tmp_path) for word in asked)]

    done = subprocess.run(command, cwd=bundled_model_path().parents[1], capture_output=True, text=True, check=True)

    [line] = [line for line in done.stdout.replace("\\\n", " ").splitlines() if "training.research.bundle" in line]
    assert line.partition("training.research.bundle")[2].split() == flags.format(tmp_path).split()


def test_a_second_build_in_one_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for stage in ("build", "compare"):
        monkeypatch.setattr(bundle, stage, None)
    with claim(tmp_path, "make model"):
        for what in ([], ["--controls"]):
            monkeypatch.setattr("sys.argv", ["bundle", "--work-dir", str(tmp_path), *what])
            with pytest.raises(SystemExit):
                bundle.main()
            assert f"--work-dir {tmp_path}: another python -m training.research.bundle is at" in capfd.readouterr().err


def test_nothing_is_built_on_a_run_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def stopped() -> Iterator[threading.Event]:
        event = threading.Event()
        event.set()
        yield event

    monkeypatch.setattr(bundle, "RUNS", on_bundled())
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


def test_a_build_may_stand_on_a_backbone_that_is_there_and_mixes_no_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled, work, target = bundled_model_path(), tmp_path / "work", tmp_path / "target"
    monkeypatch.setattr(bundle, "RUNS", on_bundled())
    with monkeypatch.context() as patched:
        patched.setattr(bundle, "pretrain", None)  # none is grown
        bundle.build(work, None, None, target, backbone=bundled)

    kept, own = (checkpoint.read_backbone(path) for path in (bundled, target))
    assert checkpoint.fingerprint(own) == checkpoint.fingerprint(kept)
    assert (target / pretrain.PRETRAIN_JSON).read_bytes() == (bundled / pretrain.PRETRAIN_JSON).read_bytes()

    with pytest.raises(ConfigError, match=r"--backbone .*: no finished run's pretrain.json there"):
        bundle.build(work, None, None, target, backbone=next(work.glob("model-*/decoder")))
    monkeypatch.setattr(bundle, "RUNS", on_bundled(lr=2e-3))
    monkeypatch.setattr(bundle, "train", Mock(side_effect=RuntimeError("trained anew")))
    with pytest.raises(RuntimeError, match="trained anew"):  # nothing of another recipe is taken
        bundle.build(work, None, None, target, backbone=bundled)


def test_a_backbone_of_another_recipe_or_text_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown: list[Path] = []
    monkeypatch.setattr(bundle, "pretrain", lambda settings: grown.append(settings.output_dir))
    text, moved, other = (tmp_path / name for name in ("text.jsonl", "moved.jsonl", "other.jsonl"))
    for file, content in ((text, "one"), (moved, "one"), (other, "two")):
        file.write_text(content)

    places = [bundle._grown(tmp_path, file) for file in (text, moved, other, None)]
    monkeypatch.setattr(bundle, "PretrainSettings", partial(PretrainSettings, **SMALL | {"seed": 1}))
    places.append(bundle._grown(tmp_path, None))

    assert places == grown
    assert places[0] == places[1]
    assert len(set(places)) == 4
    with pytest.raises(ConfigError, match=r"--text-file .*missing: cannot be read: No such file or directory"):
        bundle._grown(tmp_path, tmp_path / "missing")
