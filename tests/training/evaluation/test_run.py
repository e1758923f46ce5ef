"""Evaluation: exact limits, paired tests against baseline and control, and reports that go on where they stopped."""

import csv
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from tests.conftest import randomize
from training.config import EvalSettings, PretrainSettings, TrainSettings
from training.evaluation.algebra import Judge
from training.evaluation.answers import Answer
from training.evaluation.report import as_table, show_p, write_report
from training.evaluation.run import evaluate_model
from training.evaluation.statistics import Paired
from training.pretrain import pretrain
from training.run import train
from trm import TRMForCausalLM, checkpoint
from trm.chat import SYSTEM_PROMPTS
from trm.engine import Request
from trm.errors import CheckpointError, ConfigError

PICTURES = ("accuracy", "operations", "loss", "calibration", "halting", "votes")
TIMINGS = ("seconds_per_answer", "elapsed_s")


@pytest.fixture(scope="module")
def model_dir(backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A checkpoint whose decoder disagrees with its backbone, trained effort 3."""
    directory = tmp_path_factory.mktemp("model") / "checkpoint"
    backbone = checkpoint.read_backbone(backbone_dir)
    model = TRMForCausalLM.from_backbone(backbone, n_latent=1, n_cycles=1, n_supervision=3)
    randomize(model).save_pretrained(directory, tokenizer)
    return directory


@pytest.fixture
def settings(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EvalSettings]:
    """Settings of an evaluation that takes a second. A random model is never right: here, every other reply is."""
    monkeypatch.setattr("training.evaluation.decoding.is_correct", lambda reply, gold: sum(map(ord, reply)) % 2 == 0)

    def make(**changes: Any) -> EvalSettings:
        small: dict[str, Any] = {"model": str(model_dir), "dataset": "synthetic:easy", "limit": 7, "max_tokens": 6}
        return EvalSettings(num_threads=1, **(small | changes))

    return make


def test_report_with_baseline_control_and_votes(
    settings: Callable[..., EvalSettings], backbone_dir: Path, tmp_path: Path
) -> None:
    control = tmp_path / "longer"
    control.symlink_to(backbone_dir)
    asked = settings(
        baseline="backbone", control=[str(control)], effort=[1, 2], samples=2, limit=9, report=tmp_path / "out"
    )

    report = evaluate_model(asked)

    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (report["n"], report["trained_effort"]) == (9, 3)
    assert [row["effort"] for row in report["efforts"]] == [0, 1, 2, 3]  # the baseline's, and the control's opponent
    for row in (*report["efforts"], report["control"]):
        assert row["accuracy"] == row["correct"] / 9
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert 0 < row["tokens_per_answer"] <= 6
        assert row["seconds_per_answer"] > 0
    none, *_, trained = report["efforts"]
    assert report["baseline"]["name"] == "frozen backbone"
    assert report["baseline"]["accuracy"] == none["accuracy"]
    assert (none["wins"], none["losses"], none["mcnemar_p"]) == (0, 0, 1.0)
    assert trained["wins"] - trained["losses"] == trained["correct"] - none["correct"]
    assert trained["wins"] + trained["losses"] > 0  # or the tests below could not fail
    assert trained["mean_steps"] == 3
    # The control is the backbone itself: the same problems are won and lost as against effort 0, in one comparison.
    assert report["controls"] == [report["control"]]
    assert (report["control"]["name"], report["control"]["compute"]) == ("longer", None)
    assert [report["control"][name] for name in ("correct", "wins", "losses")] == [
        none["correct"], trained["wins"], trained["losses"],
    ]  # fmt: skip
    assert report["control"]["mcnemar_p"] == Paired(trained["wins"], trained["losses"]).p
    smallest = min(Paired(row["wins"], row["losses"]).p for row in report["efforts"][1:])
    assert min(row["mcnemar_p"] for row in report["efforts"][1:]) == min(1, 3 * smallest)
    assert sum(row["problems"] for row in report["votes"]["bins"]) == 9

    groups = report["operations"]
    assert [group["operations"] for group in groups] == [1, 2]
    assert sum(group["n"] for group in groups) == 9
    for index, row in enumerate(report["efforts"]):
        of_groups = [round(group["efforts"][index]["accuracy"] * group["n"]) for group in groups]
        assert sum(of_groups) == row["correct"]
    assert {group["controls"][0]["name"] for group in groups} == {"longer"}
    assert groups[0]["controls"][0]["accuracy"] == groups[0]["efforts"][0]["accuracy"]  # it is the backbone

    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 9 * (4 + 1 + 2)
    assert {"source", "question", "expected", "reply", "right"} <= answers[0].keys()
    with (tmp_path / "out" / "report.csv").open() as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [r["accuracy"] for r in report["efforts"]]
    for name in PICTURES:
        assert imread(tmp_path / "out" / f"{name}.png").std() > 0.05, name
    table = as_table(report).splitlines()
    assert [line.split("  ")[0] for line in table[3:9]] == [
        "effort 0 (baseline)", "effort 1", "effort 2", "effort 3", "control: longer", "effort 3, 2 votes",
    ]  # fmt: skip
    assert [line.split("  ")[0] for line in table[-3:]] == [
        "right, by operations", *(f"{group['operations']} ({group['n']} problems)" for group in groups),
    ]  # fmt: skip


def test_another_baseline_and_controls_plain_and_recursive(
    settings: Callable[..., EvalSettings], model_dir: Path, backbone_dir: Path, tmp_path: Path
) -> None:
    plain, twin = tmp_path / "plain", tmp_path / "twin"
    plain.mkdir()
    for file in backbone_dir.iterdir():
        (plain / file.name).symlink_to(file)
    (plain / "control.json").write_text('{"compute": "equal CPU seconds"}')
    twin.symlink_to(model_dir)

    report = evaluate_model(settings(baseline=str(model_dir), effort=[0], control=[str(plain), str(twin)]))

    assert report["baseline"]["name"] == "checkpoint"
    effort_0, trained = report["efforts"]
    assert (effort_0["effort"], effort_0["wins"], effort_0["losses"]) == (0, 0, 0)  # the same backbone
    first, second = report["controls"]
    assert (first["name"], first["compute"], first["mean_steps"]) == ("plain", "equal CPU seconds", 0)
    assert first["correct"] == effort_0["correct"]
    assert (second["name"], second["mean_steps"]) == ("twin", trained["effort"])  # at the effort it was trained for
    assert (second["wins"], second["losses"], second["correct"]) == (0, 0, trained["correct"])
    alone = evaluate_model(settings(effort=[1]))
    assert alone["baseline"] is None
    assert alone["efforts"][0]["mcnemar_p"] is None


def test_the_limit_is_exact(
    settings: Callable[..., EvalSettings], jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    rows = jsonl(*({"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(5)))
    caplog.set_level(logging.INFO)

    assert evaluate_model(settings(dataset=str(rows), limit=3, effort=[0]))["n"] == 3
    assert "takes all" not in caplog.text
    assert evaluate_model(settings(dataset=str(rows), limit=6, effort=[0]))["n"] == 5
    assert "has only 5 problems; --limit 6 takes all of them" in caplog.text


@pytest.mark.parametrize(
    ("dataset", "work", "asked"),
    [
        ("synthetic:easy", None, ["full"]),
        ("synthetic:easy", "equations", ["equations"]),
        ("synthetic:mental", None, ["none"]),
        ("synthetic:easy,mental", None, ["full", "none"]),
        ("synthetic:easy,mental", "full", ["full"]),
    ],
    ids=str,
)
def test_each_problem_is_asked_for_its_work(
    settings: Callable[..., EvalSettings],
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Any,
    dataset: str,
    work: str | None,
    asked: list[str],
) -> None:
    prompts: list[str] = []

    def request(ids: Sequence[int], *rest: Any) -> Request:
        prompts.append(tokenizer.decode(ids))
        return Request(ids, *rest)

    monkeypatch.setattr("training.evaluation.decoding.Request", request)
    evaluate_model(settings(dataset=dataset, work=work, limit=9, max_tokens=1, effort=[0]))

    assert len(prompts) == 9
    assert {name for text in prompts for name, system in SYSTEM_PROMPTS.items() if system in text} == set(asked)


def test_solutions_that_are_not_known_are_not_read(
    settings: Callable[..., EvalSettings], jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"question": "1 and 1?", "answer": "#### 2"}, {"question": "1 and 2?", "answer": "<<1+2=3>>3\n#### 3"}]
    read = []
    for count in (1, 2):
        asked = settings(dataset=str(jsonl(*rows[:count])), work="equations", effort=[0], report=tmp_path / str(count))
        read.append(evaluate_model(asked).get("teacher_forced", {}).get("n"))

    assert read == [None, 1]


@pytest.mark.parametrize(("effort", "deepest"), [([0], 3), ([1, 5], 5)], ids=["as-trained", "deeper"])
def test_solutions_are_read_as_deep_as_was_trained_or_asked_for(
    settings: Callable[..., EvalSettings], tmp_path: Path, effort: list[int], deepest: int
) -> None:
    report = evaluate_model(settings(effort=effort, limit=2, max_tokens=1, report=tmp_path / "report"))

    steps = [row["step"] for row in report["teacher_forced"]["loss_per_step"]]
    assert report["trained_effort"] == 3
    assert steps == list(range(deepest + 1))


def test_settings_that_do_not_fit(settings: Callable[..., EvalSettings], backbone_dir: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.symlink_to(backbone_dir)

    with pytest.raises(ConfigError, match="--effort 17: this model takes 0 to 16"):
        evaluate_model(settings(effort=[17]))
    with pytest.raises(ConfigError, match=r"need .* positions; the model has 1024"):
        evaluate_model(settings(max_tokens=1024))
    with pytest.raises(ConfigError, match=f"--control {twin}: is given twice"):
        evaluate_model(settings(control=[str(twin), f"{twin}/"]))


def test_a_control_without_room_costs_nobody_the_answers_before_it(
    settings: Callable[..., EvalSettings], backbone_dir: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(backbone_dir, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))

    with pytest.raises(ConfigError, match=r"short: the longest prompt and --max-tokens need \d+ positions; .* has 16"):
        evaluate_model(settings(control=[str(short)], report=tmp_path / "out"))
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_seconds_are_those_of_decoding(settings: Callable[..., EvalSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(judge: Judge, answer: Answer) -> Answer:
        time.sleep(2)
        return answer

    monkeypatch.setattr(Judge, "judged", slowly)

    [row] = evaluate_model(settings(effort=[0], limit=3))["efforts"]

    assert row["seconds_per_answer"] < 1


def test_math_verify_may_have_judged_some_efforts_only(tmp_path: Path) -> None:
    """Its extra was installed between the parts of an evaluation."""
    known: dict[str, Any] = {
        "accuracy": 0.5, "interval": [0.1, 0.9], "correct": 1, "tokens_per_answer": 1.0, "mean_steps": 1.0,
        "seconds_per_answer": 0.1, "wins": None, "losses": None, "mcnemar_p": None,
    }  # fmt: skip
    efforts = [{"effort": 0} | known, {"effort": 1, "math_verify": 0.25} | known]
    report = {
        "efforts": efforts,
        "trained_effort": 1,
        "baseline": None,
        "dataset": "d",
        "seed": 0,
        "n": 2,
        "verdicts": {},
    }

    write_report(tmp_path, report)

    with (tmp_path / "report.csv").open() as file:
        assert [row["math_verify"] for row in csv.DictReader(file)] == ["", "0.25"]
    table = as_table(report).splitlines()
    assert [line.split()[-1] for line in table if line.startswith("effort")] == ["0.1000", "25.0%"]


def test_a_p_that_is_too_small_for_a_double_is_not_nothing() -> None:
    assert [show_p(p) for p in (0.0, 1e-300, 0.0016, 1.0)] == ["< 1e-300", "1e-300", "0.0016", "1"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda place: (place / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (lambda place: (place / "config.json").write_text('{"model_type": "gpt2"}'), "'gpt2' is not supported"),
    ],
    ids=["tokenizer", "architecture"],
)
@pytest.mark.parametrize("role", ["baseline", "control"])
def test_a_model_that_cannot_be_compared_with_costs_no_answers(
    settings: Callable[..., EvalSettings],
    backbone_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    harm: Callable[[Path], Any],
    message: str,
) -> None:
    monkeypatch.setattr("training.evaluation.run.answer_problems", lambda *_, **__: pytest.fail("answered first"))
    place = Path(shutil.copytree(backbone_dir, tmp_path / "other"))
    harm(place)

    with pytest.raises(CheckpointError, match=message):
        evaluate_model(settings(**{role: str(place) if role == "baseline" else [str(place)]}))


def test_controls_of_one_name_are_told_apart_by_where_they_lie(
    settings: Callable[..., EvalSettings], backbone_dir: Path, tmp_path: Path
) -> None:
    places = [tmp_path / run / part / "checkpoint-3" for run, part in (("a", "x"), ("b", "x"), ("b", "y"))]
    for place in places:
        place.parent.mkdir(parents=True)
        place.symlink_to(backbone_dir)

    report = evaluate_model(settings(effort=[0], control=[*map(str, places), str(backbone_dir)]))

    names = [control["name"] for control in report["controls"]]
    assert names == ["a/x/checkpoint-3", "b/x/checkpoint-3", "y/checkpoint-3", backbone_dir.name]


@pytest.mark.parametrize(("work", "warned"), [(None, False), ("none", True)])
def test_replies_that_the_model_never_learned_are_warned_of(
    settings: Callable[..., EvalSettings], caplog: pytest.LogCaptureFixture, work: str | None, warned: bool
) -> None:
    evaluate_model(settings(effort=[0], limit=1, work=work))

    assert ("replies of --work none are asked for, and this model learned those of full" in caplog.text) == warned


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_timings(inside) for name, inside in value.items() if name not in TIMINGS}
    return [without_timings(inside) for inside in value] if isinstance(value, list) else value


def test_an_interrupted_evaluation_goes_on(
    settings: Callable[..., EvalSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("training.evaluation.pictures.draw", lambda directory, report: [])  # takes seconds
    whole = evaluate_model(settings(report=tmp_path / "whole"))
    written = itertools.count()

    def ten(answer: Any) -> dict[str, Any]:
        if next(written) == 10:  # between taking the answer in and writing it
            raise KeyboardInterrupt
        return asdict(answer)

    with monkeypatch.context() as patched:
        patched.setattr("training.evaluation.answers.asdict", ten)
        with pytest.raises(KeyboardInterrupt):
            evaluate_model(settings(report=tmp_path / "cut"))
    assert "interrupted after 10 of 21 answers; they are kept in" in caplog.text
    with (tmp_path / "cut" / "answers.jsonl").open("a") as file:
        file.write('{"candidate": "mod')  # as a power cut leaves it
    resumed = evaluate_model(settings(report=tmp_path / "cut"))

    assert without_timings(resumed) == without_timings(whole)
    cut, uncut = (
        sorted(
            json.dumps(without_timings(json.loads(line)))
            for line in (tmp_path / name / "answers.jsonl").read_text().splitlines()
        )
        for name in ("cut", "whole")
    )
    assert cut == uncut  # nothing twice, nothing missing

    monkeypatch.delattr("training.evaluation.run.answer_problems")  # a finished one decodes nothing
    assert evaluate_model(settings(report=tmp_path / "cut")) == resumed


def test_a_report_directory_of_another_evaluation_is_refused(
    settings: Callable[..., EvalSettings], jsonl: Callable[..., Path], model_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    report = tmp_path / "out"
    evaluate_model(settings(report=report, effort=[0], limit=2))
    other = TRMForCausalLM.from_pretrained(model_dir)
    randomize(other, seed=1).save_pretrained(tmp_path / "other", tokenizer)
    rows = jsonl({"question": "1 and 1?", "answer": "#### 2"})
    before = (report / "answers.jsonl").read_bytes()

    for name, value in {
        "seed": 1, "limit": 3, "effort": [1], "max_tokens": 7, "samples": 2, "dataset": str(rows),
        "work": "none", "model": str(tmp_path / "other"), "control": [str(model_dir)], "dtype": "bfloat16",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"with another .*--{name.replace('_', '-')} "):
            evaluate_model(settings(**({"report": report, "effort": [0], "limit": 2} | {name: value})))
    assert (report / "answers.jsonl").read_bytes() == before
    (report / "settings.json").unlink()
    with pytest.raises(ConfigError, match=r"there is report\.json and answers\.jsonl already, but no settings\.json"):
        evaluate_model(settings(report=report))


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
    small = {
        "max_steps": 10,
        "batch_size": 4,
        "families": ["easy", "mental"],
        "hidden_size": 64,
        "num_layers": 1,
        "vocab_size": 400,
        "num_threads": 1,
    }

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
