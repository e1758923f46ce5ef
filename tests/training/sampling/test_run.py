"""Sampling: what is kept, the same bytes whatever happens in between, and a file that trains."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from training.cli import sample as command
from training.config import SampleSettings, TrainSettings
from training.directories import JsonLines
from training.evaluation.answers import Answer, Answers
from training.evaluation.candidates import load
from training.problems.data import load_problems
from training.problems.problem import Problem
from training.run import train
from training.sampling.run import sample
from training.sampling.solutions import Solutions, select
from trm import bundled_model_path, checkpoint
from trm.chat import solve_messages
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.errors import CheckpointError, ConfigError

Make = Callable[..., SampleSettings]


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's backbone as a model by itself."""
    directory = tmp_path_factory.mktemp("plain")
    bundled = bundled_model_path()
    for file in (*(bundled / "backbone").iterdir(), *bundled.glob("tokenizer*"), bundled / "chat_template.jinja"):
        (directory / file.name).symlink_to(file)
    return directory


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Settings of a sampling by the bundled model at a temperature at which it errs; keywords replace any of them."""

    def settings(**changes: Any) -> SampleSettings:
        small: dict[str, Any] = {
            "output": tmp_path / "own.jsonl",
            "limit": 6,
            "samples": 4,
            "temperature": 2.0,
            "max_tokens": 48,
            "seed": 3,
            "num_threads": 1,
        }
        return SampleSettings(**(small | changes))

    return settings


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def beside(output: Path, ending: str) -> Path:
    return output.with_name(f"{output.name}.{ending}")


# --- with the model ------------------------------------------------------------------------------


def test_rows_are_right_ordered_and_the_same_in_any_company(make: Make, tmp_path: Path) -> None:
    summary = sample(make())
    alone = make(output=tmp_path / "alone.jsonl", max_rows=1)
    sample(alone)

    output = tmp_path / "own.jsonl"
    assert output.read_bytes() == alone.output.read_bytes()
    orders = [
        [(a["problem"], a["sample"]) for a in rows_of(beside(file, "replies"))] for file in (output, alone.output)
    ]
    assert sorted(orders[0]) == orders[1] != orders[0]
    problems = load_problems("synthetic", split="train", seed=3, num_problems=6)
    answers = rows_of(beside(output, "replies"))
    rows = rows_of(output)
    right = [a for a in answers if a["right"] and a["finish_reason"] == "stop"]
    assert 0 < len(right) < len(answers) == 24
    order = [(row["seed"] - 3, row["sample"]) for row in rows]
    assert order == sorted(order)
    by_question = {problem.question: problem for problem in problems}
    for row in rows:
        assert row["answer"] in [a["reply"] for a in right if a["question"] == row["question"]]
        assert row["source"] == by_question[row["question"]].source
    cut = sum(a["finish_reason"] == "length" for a in answers)
    assert cut
    assert f"{len(right)} right ({len(right) / 24:.1%}), {cut} cut off at --max-tokens 48, {len(rows)} kept" in summary
    decided = json.loads(beside(output, "json").read_text())
    assert {row["model"] for row in rows} == {decided["model"]}
    trained = checkpoint.read_config(bundled_model_path()).n_supervision
    assert (decided["temperature"], decided["seed"], decided["effort"]) == (2.0, 3, trained)


def test_a_sampling_that_was_interrupted_goes_on(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make(output=tmp_path / "whole.jsonl")
    summary = sample(whole)
    add = Answers.add

    def add_ten(self: Answers, answer: Answer) -> None:
        if len(self.by_key) == 10:
            raise KeyboardInterrupt
        add(self, answer)

    monkeypatch.setattr(Answers, "add", add_ten)
    with pytest.raises(KeyboardInterrupt):
        sample(make())
    output = tmp_path / "own.jsonl"
    assert f"interrupted after 10 of 24 answers; they are kept in {beside(output, 'replies')}" in caplog.text
    assert whole.output.read_bytes().startswith(output.read_bytes())
    monkeypatch.setattr(Answers, "add", add)
    resumed = sample(make())

    assert output.read_bytes() == whole.output.read_bytes()
    assert resumed.replace("own.jsonl", "whole.jsonl").splitlines()[:2] == summary.splitlines()[:2]
    assert len(rows_of(beside(output, "replies"))) == 24  # nothing was decoded twice
    monkeypatch.delattr("training.sampling.run.decoding")  # a finished one decodes nothing
    assert sample(make()) == resumed


def test_a_plain_model_samples_at_effort_0(make: Make, plain_dir: Path, tmp_path: Path) -> None:
    """Its greedy replies are the engine's own at effort 0; one right reply says nothing about always."""
    settings = make(model=str(plain_dir), samples=1, temperature=0.0)
    sample(settings)
    problems = load_problems("synthetic", split="train", seed=3, num_problems=6)
    model, chat = load(plain_dir, "cpu")
    params = SamplingParams(max_tokens=48, n_supervision=0)
    requests = [Request(tuple(chat.encode(solve_messages(p.question))), params) for p in problems]

    replies = Engine(model, chat, EngineConfig(max_rows=1, max_model_len=256)).generate(requests)

    kept = {row["question"]: row["answer"] for row in rows_of(settings.output)}
    assert kept
    said = {problem.question: reply.text for problem, reply in zip(problems, replies, strict=True)}
    assert kept.items() <= said.items()
    assert json.loads(beside(settings.output, "json").read_text())["effort"] == 0
    with pytest.raises(ConfigError, match=f"--effort 2: {plain_dir} is a plain model, which takes 0 only"):
        sample(make(model=str(plain_dir), effort=2))


def test_the_file_is_a_data_set(make: Make, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Tom has 5 pens. He buys 3 pens. How many pens does he have?", "answer": "#### 8"}\n')
    settings = make(dataset=str(rows), limit=None, samples=2, temperature=0.5, keep_solved=True)
    sample(settings)

    [row] = rows_of(settings.output)
    assert row["answer"] == "5+3=8\n\\boxed{8}"
    assert (row["equations"], row["steps"]) == (["5+3=8"], ["8"])
    assert row["source"] == f"{rows}:1"
    [problem] = load_problems(str(settings.output), split="train", seed=0)
    assert (problem.question, problem.solution, problem.answer) == (row["question"], row["answer"], "8")
    assert (problem.equations, problem.steps) == (("5+3=8",), ("8",))
    small = {"n_latent": 1, "n_cycles": 1, "n_supervision": 1, "num_threads": 1, "validation_problems": 0}
    assert train(TrainSettings(dataset=str(settings.output), output_dir=tmp_path / "run", **small)).is_dir()


def test_rows_say_how_much_work_their_replies_show(make: Make) -> None:
    settings = make(dataset="synthetic:mental*9,have", temperature=1.0, keep_solved=True, limit=20, max_tokens=64)
    sample(settings)

    rows = rows_of(settings.output)
    families = {row["source"]: row.get("work") for row in rows}
    assert families["mental"] == "none"
    assert families.get("have") is None
    loaded = load_problems(str(settings.output), split="train", seed=0)
    assert [problem.work for problem in loaded] == [row.get("work") for row in rows]
    asked = load_problems("synthetic:mental*9,have", split="train", seed=3, num_problems=20)
    known = {problem.question: problem.steps for problem in asked}
    assert any(len(problem.steps) > 1 for problem in loaded if problem.work == "none")
    assert all(
        problem.steps == known[problem.question] for problem in loaded
    )  # an answer at once has those that are known


def test_precision_is_a_setting(make: Make, plain_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr("training.sampling.run.load", lambda *how: loaded.append(load(*how)) or loaded[-1])

    for name, model in (("ours", None), ("plain", str(plain_dir))):
        settings = make(model=model, dtype="bfloat16", limit=1, samples=1, output=tmp_path / name)
        sample(settings)
        assert json.loads(beside(settings.output, "json").read_text())["dtype"] == "bfloat16"
    assert {m.backbone.dtype for m, _ in loaded} == {m.decoder.dtype for m, _ in loaded} == {torch.bfloat16}


# --- with replies that are given -----------------------------------------------------------------


def answer(problem: int = 0, sample: int = 0, reply: str = r"1+1=2 \boxed{2}", **changes: Any) -> Answer:
    known: dict[str, Any] = {
        "candidate": "model", "effort": 4, "source": "", "question": "", "expected": "2", "right": True,
        "finish_reason": "stop", "tokens": 5, "steps": 20, "elapsed_s": 0.5,
    }  # fmt: skip
    return Answer(problem=problem, sample=sample, reply=reply, **(known | changes))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (r"1+1=2, 2*3=6 \boxed{6}", {"equations": ["1+1=2", "2*3=6"], "steps": ["2", "6"]}),
        (r"\boxed{6}", {"steps": ["5", "6"]}),  # the problem's own
        (r"200% * 3 = 6 \boxed{6}", {"steps": ["5", "6"]}),
        (r"\boxed{6 or 7}", {}),  # another answer, whoever called it right
        (r"2*3=6 \boxed{6, 0}", {}),
    ],
)
def test_a_row_has_steps_that_lead_to_its_own_answer(make: Make, reply: str, expected: dict[str, Any]) -> None:
    settings = make(samples=1)
    problem = Problem("Q?", r"\boxed{6}", "rows:1", steps=("5", "6"))
    given = answer(reply=reply)
    with Solutions(settings, "m", [problem], [given.key]) as solutions:
        assert solutions.write({given.key: given}) == 1

    [row] = rows_of(settings.output)
    assert {name: row[name] for name in ("equations", "steps") if name in row} == expected
    [loaded] = load_problems(str(settings.output), split="train", seed=0)
    assert loaded.steps == tuple(expected.get("steps", ()))


def test_one_of_each_derivation_is_kept() -> None:
    replies = [
        r"1+1=2 \boxed{2}",
        r"One and one: $1 + 1 = 2$, so \boxed{2}",
        r"3-1=2 \boxed{2}",
        r"\boxed{2}",
        r"It is \boxed{2}",
        r"It  is \boxed{2}",
        r"3-1=2, 1+1=2 \boxed{2}",
        r"1+1=3 \boxed{3}",
        r"2*1=2 \boxed{2}",
    ]
    found = [answer(sample=n, reply=text, right="3}" not in text) for n, text in enumerate(replies)]
    found[-1] = answer(sample=8, reply=replies[8], finish_reason="length")  # right, but cut off

    assert [kept.sample for kept in select(found, 9, False)] == [0, 2, 3, 4, 6]
    assert [kept.sample for kept in select(found, 3, False)] == [0, 2, 3]


def test_problems_that_are_always_solved_are_left_out() -> None:
    always = [answer(sample=n) for n in range(3)]
    once = [answer(), answer(sample=1, right=False)]
    cut = [answer(), answer(sample=1, finish_reason="length")]

    assert select(always, 4, False) == []
    assert select(always, 4, True) == always[:1]
    assert select(once, 4, False) == select(cut, 4, False) == once[:1]
    assert select(always[:1], 4, False) == always[:1]
    assert select([answer(right=False)], 4, True) == []


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No model: replies to four problems come in a shuffled order; lists the keys that were decoded."""
    texts = [r"1+1=2 \boxed{2}", r"2+0=2 \boxed{2}", "no"]
    log: list[Any] = []

    @contextmanager
    def decoding(*args: Any, **kwargs: Any) -> Iterator[Any]:
        def decode(run: Any, wanted: Sequence[Any]) -> Iterator[Answer]:
            for key in sorted(wanted, key=lambda key: (key.problem ^ 1, -key.sample)):  # problems 1, 0, 3, 2
                log.append(key)
                text = texts[(key.problem + key.sample * key.problem) % 3]
                yield answer(key.problem, key.sample, text, right="box" in text, effort=key.effort)

        yield decode

    monkeypatch.setattr("training.sampling.run.load", lambda *args: (None, None))
    monkeypatch.setattr("training.sampling.run.decoding", decoding)
    return log


def test_cut_anywhere_it_ends_in_the_same_bytes(make: Make, decoded: list[Any], tmp_path: Path) -> None:
    settings = make(limit=4, samples=3)
    output = settings.output
    sample(settings)
    whole, journal = output.read_bytes(), beside(output, "replies").read_bytes()
    assert len(rows_of(output)) == 4
    lines = journal.splitlines(keepends=True)
    ends = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]

    for cut in sorted({*ends, *(end - 1 for end in ends[1:]), *(end + 9 for end in ends[:-1])}):
        for left in (b"", whole[: cut % len(whole)], whole):
            beside(output, "replies").write_bytes(journal[:cut])
            output.write_bytes(left)
            decoded.clear()
            sample(settings)
            assert output.read_bytes() == whole
            assert len(decoded) == 12 - sum(end <= cut for end in ends[1:])
    output.unlink()  # the rows follow from the replies
    sample(settings)
    assert output.read_bytes() == whole


def test_rows_wait_for_the_problems_before_theirs(
    make: Make, decoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make(limit=4, samples=3)
    seen: list[bytes] = []
    add = Answers.add

    def look(self: Answers, one: Answer) -> None:
        seen.append(settings.output.read_bytes())
        add(self, one)

    monkeypatch.setattr(Answers, "add", look)
    sample(settings)

    whole = settings.output.read_bytes()
    assert all(whole.startswith(part) and (not part or part.endswith(b"\n")) for part in seen)
    assert len({*seen, whole}) == 3  # nothing, those of problems 0 and 1, all


def test_the_same_problems_asked_otherwise_are_others(
    make: Make, decoded: list[Any], jsonl: Callable[..., Path]
) -> None:
    row = {"question": "1 and 1?", "answer": r"\boxed{2}"}
    path = jsonl(row)
    settings = make(dataset=str(path), limit=None)
    sample(settings)
    path.write_text(json.dumps(row | {"work": "none"}) + "\n")

    with pytest.raises(ConfigError, match="another --dataset"):
        sample(settings)


def test_another_command_is_refused(
    make: Make, plain_dir: Path, decoded: list[Any], tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    rows = jsonl({"question": "1 and 1?", "answer": "#### 2"})
    begun: dict[str, Any] = {"limit": 2, "samples": 2}
    sample(make(**begun))
    before = [file.read_bytes() for file in sorted(tmp_path.glob("own.jsonl*"))]

    for name, value in {
        "samples": 3, "temperature": 1.0, "top_p": 0.5, "max_tokens": 9, "seed": 4,
        "model": str(plain_dir), "dataset": str(rows), "limit": 3, "effort": 1, "dtype": "bfloat16",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"begun with another .*--{name.replace('_', '-')} ") as refused:
            sample(make(**(begun | {name: value})))
        assert "choose another place, or the settings it was begun with" in str(refused.value)
    assert [file.read_bytes() for file in sorted(tmp_path.glob("own.jsonl*"))] == before
    sample(make(**begun, max_rows=3, num_threads=1))  # decides nothing


def test_what_selects_replies_may_change(make: Make, decoded: list[Any], tmp_path: Path) -> None:
    settings = {"limit": 4, "samples": 3}
    sample(make(**settings, keep_solved=True, output=tmp_path / "all.jsonl"))
    sample(make(**settings, keep=1))
    some = (tmp_path / "own.jsonl").read_bytes()
    decoded.clear()

    sample(make(**settings, keep_solved=True))

    assert decoded == []  # the rows are made anew, the replies are not
    rows = (tmp_path / "own.jsonl").read_bytes()
    assert rows == (tmp_path / "all.jsonl").read_bytes() != some
    noted = [json.loads((tmp_path / f"{name}.jsonl.json").read_text()) for name in ("own", "all")]
    assert noted[0] == noted[1]
    assert noted[0]["keep_solved"]


def test_a_place_without_one_reply_takes_other_settings(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lower --max-tokens"):
        sample(make(max_tokens=10**6))

    sample(make(limit=1, samples=1))

    settings = json.loads(beside(tmp_path / "own.jsonl", "json").read_text())
    assert settings["max_tokens"] == 48
    beside(tmp_path / "own.jsonl", "replies").write_text("")
    (tmp_path / "own.jsonl").write_text("precious\n")
    with pytest.raises(ConfigError, match="begun with another --seed"):
        sample(make(limit=1, samples=1, seed=4))
    assert (tmp_path / "own.jsonl").read_text() == "precious\n"


def test_a_file_of_the_settings_name_is_not_touched(make: Make, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl.json").write_text('{"precious": 1}')

    with pytest.raises(ConfigError, match="begun with another --samples"):
        sample(make())
    assert (tmp_path / "own.jsonl.json").read_text() == '{"precious": 1}'


@pytest.mark.parametrize("there", ["own.jsonl", "own.jsonl.replies"])
def test_what_is_not_ours_is_not_touched(make: Make, decoded: list[Any], tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("precious\n")

    with pytest.raises(ConfigError, match=rf"there is {there} already, but no own\.jsonl\.json to say how"):
        sample(make())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious\n"]


def test_two_at_once_are_refused(make: Make, decoded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    add = Answers.add

    def second(self: Answers, one: Answer) -> None:
        if not self.by_key:
            with pytest.raises(ConfigError, match="another trm-sample is at work there"):
                sample(make())
        add(self, one)

    monkeypatch.setattr(Answers, "add", second)
    sample(make())
    assert len(decoded) == 24


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    lines = JsonLines(Path("/dev/full"), "w")

    with pytest.raises(CheckpointError, match="/dev/full: cannot be written: No space left on device; once it can"):
        lines.write([{"question": "long"}])
    lines.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "--samples 4: at --temperature 0 all are the same; use --samples 1, or a temperature"),
        (["--temperature", "2.1"], "--temperature"),
        (["--samples", "0"], "--samples"),
        (["--keep", "0"], "--keep"),
        (["--top-p", "0"], "--top-p"),
        (["--effort", "-1"], "--effort"),
        (["--effort", "17"], "--effort 17: this model takes 0 to 16"),
        (["--dataset", "gsm9k"], "--dataset gsm9k: no such file"),
        (["--model", "nowhere/at/all"], "nowhere/at/all: no such directory"),
        (["--quantize", "int8", "--dtype", "float32"], "leave --dtype float32 out"),
        (["--output", "."], "--output .: is a directory; name a file in it"),
        (["--output", "/dev/null/own.jsonl"], "--output /dev/null: cannot write there"),
        (["--max-tokens", "5000", "--limit", "1"], "lower --max-tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.cli.configure_logging", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setattr("sys.argv", ["trm-sample", "--limit", "1", "--num-threads", "1", *arguments])

    with pytest.raises(SystemExit) as ended:
        command()

    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code in (1, 2)
    assert said.startswith("trm-sample: ")
    assert message in said
