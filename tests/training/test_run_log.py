"""Curves that tell the truth: one point per step, whatever was cut and resumed."""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.comparing import differing_tensors
from training.config import TrainSettings
from training.run import train
from training.run_log import RunLog, above_the_bar, summarise
from trm.errors import CheckpointError, DeviceError
from trm.logs import LineHandler

Settings = Callable[..., TrainSettings]


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("gradient", ["full", "paper"])
def test_curves_go_on_without_duplicates(settings: Settings, gradient: str) -> None:
    run = train(settings(gradient=gradient, epochs=9, max_steps=20, save_steps=5, keep_last=9)).parent
    before = curves(run)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 21, "lo')  # torn by a kill

    train(TrainSettings(resume=run / "checkpoint-10"))

    after = curves(run)
    timed = "training/tokens_per_s"
    assert {tag: points for tag, points in after.items() if tag != timed} == {
        tag: points for tag, points in before.items() if tag != timed
    }
    assert [step for step, _ in after["training/loss"]] == [10, 20]
    assert [step for step, _ in after["validation/loss"]] == [5, 10, 15, 20]
    for step in ("step_01", "step_02", "step_03"):
        assert {f"{tag}/{step}" for tag in ("loss", "token_accuracy", "halting_loss", "validation_loss")} <= set(after)
    assert {"training/gradient_norm", "training/learning_rate", timed} <= set(after)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [10, 20]
    assert [line["loss"] for line in lines if "loss" in line] == [
        pytest.approx(value) for _, value in after["training/loss"]
    ]


def test_the_first_step_is_told_at_once_and_each_line_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    report = {"loss": 1.5, "supervision_step": None, "grad_norm": 2.0, "lr": 1e-4, "tokens": 10}
    report |= {"losses": [1.5], "halting_losses": [0.1], "token_accuracies": [0.5]}
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logging.getLogger(), "handlers", [LineHandler(2)])

    with RunLog(tmp_path, 0, 300, deepest=1) as log:
        for step in range(1, 6):  # long before a line of log.jsonl is due
            log.training(step, report, is_last=False)

    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("step 1 of 300, loss 1.5, ")
    assert line.endswith(" left")
    assert not (tmp_path / "log.jsonl").read_text()


def test_log_lines_stand_above_the_bar_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Written(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            events.append(record.getMessage())

    @contextmanager
    def cleared() -> Iterator[None]:
        events.append("cleared")
        yield
        events.append("drawn")

    monkeypatch.setattr("training.run_log.tqdm.external_write_mode", cleared)
    monkeypatch.setattr(logging.getLogger(), "handlers", [Written()])
    with above_the_bar():
        logging.getLogger("training").warning("one")
    logging.getLogger("training").warning("two")

    assert events == ["cleared", "one", "drawn", "two"]


def test_means_are_per_supervision_step() -> None:
    def report(step: int, loss: float) -> dict[str, object]:
        values = {name: [loss] for name in ("losses", "halting_losses", "token_accuracies")}
        return values | {"loss": loss, "supervision_step": step, "grad_norm": 2.0, "lr": loss, "tokens": 10}

    line = summarise([report(2, 1.0), report(3, 5.0), report(2, 3.0)], deepest=3)

    assert line["losses"] == [None, 2.0, 5.0]
    assert (line["loss"], line["lr"], line["tokens"], line["grad_norm"]) == (3.0, 3.0, 30, 2.0)


@pytest.mark.parametrize("gradient", ["full", "paper"])
def test_what_is_not_finite_stops_the_run_after_saving_the_state_before(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jsonl: Callable[..., Path], gradient: str
) -> None:
    path = jsonl(*({"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(12)))
    changes = {"dataset": str(path), "gradient": gradient, "epochs": 9, "max_steps": 7}
    straight = train(settings(**changes, output_dir=tmp_path / "straight"))
    clip, calls = torch.nn.utils.clip_grad_norm_, iter(range(99))
    poisoned = 4  # with "paper", the second of a batch's three supervision steps
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *a: clip(*a) * (float("nan") if next(calls) == poisoned else 1)
    )

    with pytest.raises(DeviceError, match=r"^step 5: .*gradient norm nan.*rows\.jsonl:\d+ .*checkpoint-4$"):
        train(settings(**changes))

    assert differing_tensors(train(TrainSettings(resume=tmp_path / "run")), straight) == []


def test_run_json_sums_the_run_up(settings: Settings) -> None:
    run = train(settings(max_steps=3)).parent

    record = json.loads((run / "run.json").read_text())

    assert record["settings"]["lr"] == 1e-2
    assert record["num_examples"] == 24
    assert record["num_labels"] > 24
    assert len(record["data_fingerprint"]) == len(record["backbone_fingerprint"]) == 16
    assert record["versions"]["torch"] == torch.__version__
    assert record["step"] == record["total_steps"] == 3
    assert record["wall_s"] > 0
    assert len(record["last"]["losses"]) == len(record["validation"]["losses"]) == 3


def test_a_log_that_cannot_be_written_ends_the_run_with_the_reason(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log.jsonl")

    monkeypatch.setattr(RunLog, "_write", no_space)

    with pytest.raises(CheckpointError, match=r"log\.jsonl: cannot be written: No space left on device; .* --resume "):
        train(settings(max_steps=1))
