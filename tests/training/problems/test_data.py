"""Loading problems: every format, every bad row, and no row lost in silence."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import shared_path
from training.batches import IGNORE_INDEX, collate, epoch_order
from training.problems.data import asked_work, encode_problem, encode_problems, fingerprint, load_problems
from training.problems.problem import Problem
from trm.answers import extract_boxed
from trm.chat import SYSTEM_PROMPTS, ChatFormat, Example, solve_messages
from trm.errors import ConfigError

Jsonl = Callable[..., Path]


def load(path: Path | str) -> Any:
    return load_problems(str(path), split="train", seed=0, num_problems=10)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "Q", "answer": "48/2 = <<48/2=24>>24\n#### 24"}, "24"),
        ({"question": "Q", "answer": "so\n#### 1,234"}, "1,234"),
        ({"question": "Q", "answer": "so\n#### -3.5"}, "-3.5"),
        ({"problem": "Q", "solution": r"thus \boxed{\frac{1}{2}}"}, r"\frac{1}{2}"),
        ({"problem": "Q", "solution": r"thus \boxed{5}", "answer": "5"}, "5"),
        ({"problem": "Q", "solution": "#### Step 1\nso \\boxed{5}\n#### Done"}, "5"),
    ],
    ids=["gsm8k", "comma", "signed decimal", "math", "math with a bare answer", "headings"],
)
def test_formats(jsonl: Jsonl, row: dict[str, str], answer: str) -> None:
    (problem,) = load(jsonl(row))

    assert problem.answer == answer
    assert problem.solution.count("\\boxed") == 1
    assert "\\\\" not in problem.solution
    assert "<<" not in problem.solution
    assert "\b" not in problem.solution


def test_annotations_are_kept_only_on_request(jsonl: Jsonl) -> None:
    path = str(jsonl({"question": "Q", "answer": "48/2 = <<48/2=24>>24\n#### 24"}))
    kept = load_problems(path, split="train", seed=0, keep_annotations=True)

    assert "<<48/2=24>>" in kept[0].solution
    assert "<<" not in load(path)[0].solution


def test_bad_rows_are_named_with_their_line_counted_and_left_out(
    jsonl: Jsonl, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"question": "Q", "answer": "#### 1"}
    path = jsonl(
        good,
        "not json",
        {"question": "Q"},
        {"question": "Q", "answer": "no box"},
        "[1]",
        '{"question": "half a pair \\ud800", "answer": "#### 3"}',
        "[" * 100_000,
        {"question": " ", "answer": "#### 2"},
        good,
    )
    with caplog.at_level(logging.WARNING):
        problems = load(path)

    assert [p.source for p in problems] == [f"{path}:1", f"{path}:9"]
    for line in range(2, 9):
        assert f"{path}:{line}:" in caplog.text
    assert "7 of 9 rows left out" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [], "id": 1}, "neither question nor problem is among its columns ['messages', 'id']"),
        ({"question": "Q", "answer": "5", "solution": r"\boxed{5}"}, "answer gives its result neither as #### 72"),
        ({"problem": "Q", "solution": "5", "answer": "5"}, "solution gives its result neither as #### 72"),
        ('{"question": "Q", "answer": "9-4', "Unterminated string"),
    ],
    ids=["columns of a chat", "a bare answer", "no box", "cut short"],
)
def test_a_bad_row_is_told_what_is_wrong_with_it(
    jsonl: Jsonl, caplog: pytest.LogCaptureFixture, row: Any, message: str
) -> None:
    load(jsonl({"question": "Q", "answer": "#### 1"}, row))

    assert message in caplog.text


def test_a_byte_order_mark_costs_no_row_and_other_encodings_are_named(
    jsonl: Jsonl, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl({"question": "Q", "answer": "#### 1"})
    good = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + good + good.replace(b"Q", b"Ren\xe9"))

    assert [p.source for p in load(path)] == [f"{path}:1"]
    assert f"{path}:2: not text in UTF-8" in caplog.text


@pytest.mark.parametrize("rows", [(), ("{}",)], ids=["empty", "all bad"])
def test_a_file_without_a_good_row_is_an_error(jsonl: Jsonl, rows: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no usable row"):
        load(jsonl(*rows))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "gsm9k"])
def test_a_missing_file_names_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError, match="no such file, and not one of gsm8k, numina, math, synthetic"):
        load(name)


def test_a_directory_is_not_called_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no file; give a file with lines of JSON"):
        load(tmp_path)


def test_an_unknown_family_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match="unknown synthetic family 'hard'; there are easy, all, have"):
        load("synthetic:hard")


def test_the_hub_loader_reads_a_directory_laid_out_as_the_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    for split, rows in (("train", 3), ("test", 2)):
        lines = [json.dumps({"question": f"{split} {n}", "answer": f"#### {n}"}) for n in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    real = __import__("datasets").load_dataset

    def local(repository: str, configuration: str | None, split: str) -> Any:
        assert (repository, configuration) == ("openai/gsm8k", "main")
        return real("json", data_files=files, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("datasets.load_dataset", local)

    assert [p.question for p in load("gsm8k")] == ["train 0", "train 1", "train 2"]
    assert len(load_problems("gsm8k", split="heldout", seed=0)) == 2


def test_a_hub_dataset_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"--dataset math: cannot load .*: no route"):
        load("math")


def test_long_rows_are_dropped_and_counted_never_cut(chat: ChatFormat, caplog: pytest.LogCaptureFixture) -> None:
    rows = load_problems("synthetic:easy", split="train", seed=0, num_problems=30)
    lengths = sorted(len(chat.encode_example(p.question, p.solution).ids) for p in rows)
    with caplog.at_level(logging.WARNING):
        kept = encode_problems(rows, chat, max_length=lengths[14])

    assert max(len(e.ids) for e in kept) <= lengths[14]
    assert all(e.ids[-1] == chat.end_id for e in kept)
    assert f"{30 - len(kept)} of 30 training rows are longer" in caplog.text
    with pytest.raises(ConfigError, match=f"the shortest has {lengths[0]} tokens"):
        encode_problems(rows, chat, max_length=5)


def test_labels_are_the_reply_and_its_end_token(chat: ChatFormat) -> None:
    example = chat.encode_example("1 + 1?", r"1+1=2" + "\n" + r"\boxed{2}")
    batch = collate([example, chat.encode_example("And 2 + 2 and so on?", r"\boxed{4}")], pad_id=0)
    row = batch.labels[-1, 0]
    labels = row[row != IGNORE_INDEX].tolist()

    assert labels[-1] == chat.end_id
    assert chat.decode(labels) == "1+1=2\n\\boxed{2}"
    first = int((row != IGNORE_INDEX).nonzero()[0])
    prompt = chat.encode(solve_messages("1 + 1?"))
    assert batch.input_ids[0, : first + 1].tolist() == prompt  # the last prompt token predicts the first label


def test_every_index_comes_once_per_epoch_and_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = [(7 * n) % 50 + 1 for n in range(103)]
    orders = [epoch_order(lengths, 8, seed, epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]

    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3]
    for order in orders:
        assert sorted(index for batch in order for index in batch) == list(range(103))
        assert max(map(len, order)) == 8


def test_every_gsm8k_row_converts_and_fits_the_template(chat: ChatFormat) -> None:
    problems = load(shared_path("gsm8k/train.jsonl"))

    assert len(problems) == 6973
    assert all(extract_boxed(p.solution) for p in problems)
    assert sum(bool(p.steps) for p in problems) == 6535
    assert sum(bool(p.equations) for p in problems) == 6884  # 349 of them end in another result than the answer
    for problem in problems[::500]:
        example = chat.encode_example(problem.question, problem.solution)
        assert example.ids[-1] == chat.end_id


CLIPS = {"question": "Q", "answer": "48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72\n#### 72"}


@pytest.mark.parametrize(
    ("row", "equations", "steps"),
    [
        (CLIPS, ("48/2=24", "48+24=72"), ("24", "72")),
        ({"question": "Q", "answer": "<< 2*.5 = 1.0 >>\n#### 1"}, ("2*.5 = 1.0",), ("1.0",)),
        ({"question": "Q", "answer": "<<5>> <<2+3=>> <<2+3=5>>\n#### 6"}, ("2+3=5",), ()),
        ({"question": "Q", "answer": "#### 72"}, (), ()),
        (CLIPS | {"steps": ["20", 50, " 72 "]}, ("48/2=24", "48+24=72"), ("20", "50", "72")),
        ({"question": "Q", "answer": "#### 1,200", "steps": ["1200.0"]}, (), ("1200.0",)),
        ({"problem": "Q", "solution": r"\boxed{\frac{1}{2}}", "steps": ["3", "1/2"]}, (), ("3", "1/2")),
        (CLIPS | {"steps": None}, ("48/2=24", "48+24=72"), ("24", "72")),
        ({"question": "Q", "answer": "#### 72", "steps": []}, (), ()),
        (CLIPS | {"equations": ["40-4=36", " 2*36=72 "]}, ("40-4=36", "2*36=72"), ("36", "72")),
        (
            {"problem": "Q", "solution": r"\boxed{5}", "equations": ["2+3=5"], "steps": ["4", "5"]},
            ("2+3=5",),
            ("4", "5"),
        ),
        (CLIPS | {"equations": []}, ("48/2=24", "48+24=72"), ("24", "72")),
    ],
    ids=[
        "gsm8k",
        "spelt otherwise",
        "at odds",
        "bare",
        "given",
        "equal number",
        "math",
        "null",
        "none",
        "told",
        "both told",
        "none told",
    ],
)
@pytest.mark.parametrize("keep_annotations", [False, True])
def test_equations_and_steps(
    jsonl: Jsonl, row: dict[str, Any], equations: tuple[str, ...], steps: tuple[str, ...], keep_annotations: bool
) -> None:
    path = str(jsonl(row))
    (problem,) = load_problems(path, split="train", seed=0, keep_annotations=keep_annotations)

    assert (problem.equations, problem.steps) == (equations, steps)


def test_rows_whose_steps_do_not_fit_are_reported_with_their_line(
    jsonl: Jsonl, caplog: pytest.LogCaptureFixture
) -> None:
    bad: list[Any] = [["24", "71"], "24, 72", {"a": "72"}, ["24", " "], ["24", None, "72"], [True, "72"], [24.5, "72"]]
    path = jsonl(*(CLIPS | {"steps": steps} for steps in bad), CLIPS | {"steps": ["72"]})
    with caplog.at_level(logging.WARNING):
        problems = load(path)

    assert [p.source for p in problems] == [f"{path}:8"]
    assert f"{path}:1: the last of its steps is '71', the answer is '72'; row left out" in caplog.text
    assert f"{path}:2: steps is no list" in caplog.text
    for line, entry in {4: "' '", 5: "None", 6: "True", 7: "24.5"}.items():
        assert f"{path}:{line}: steps holds {entry}, which is neither text nor a whole number" in caplog.text
    assert "7 of 8 rows left out" in caplog.text


def test_rows_whose_equations_are_none_are_reported_with_their_line(
    jsonl: Jsonl, caplog: pytest.LogCaptureFixture
) -> None:
    bad: list[Any] = ["48+24=72", ["48+24"], ["48+24="], ["=72"], [None]]
    path = jsonl(*(CLIPS | {"equations": equations} for equations in bad), CLIPS)
    with caplog.at_level(logging.WARNING):
        problems = load(path)

    assert [p.source for p in problems] == [f"{path}:6"]
    assert f"{path}:1: equations is no list" in caplog.text
    for line, entry in {2: "48+24", 3: "48+24=", 4: "=72"}.items():
        assert f"{path}:{line}: equations holds '{entry}', which says nothing is equal" in caplog.text
    assert f"{path}:5: equations holds None" in caplog.text


TWO_STEPS = Problem("Q?", "So it is\n\\boxed{5}", "rows:1", ("12+7=19", "19-14=5"), ("19", "5"))
REPLIES = {"full": "So it is\n\\boxed{5}", "equations": "12+7=19\n19-14=5\n\\boxed{5}", "none": "\\boxed{5}"}


def asked_and_replied(chat: ChatFormat, example: Example) -> tuple[str, str]:
    """The system prompt and the reply of an example."""
    prompt, reply = chat.decode(example.ids[: example.label_start]), chat.decode(example.ids[example.label_start :])
    (system,) = [text for text in SYSTEM_PROMPTS.values() if text in prompt]
    return system, reply


def test_each_kind_of_reply_has_a_prompt_of_its_own(chat: ChatFormat) -> None:
    examples = encode_problems([TWO_STEPS] * 2, chat, 1024, ("worked", "equations", "answer"))

    expected = [(SYSTEM_PROMPTS[work], reply) for work, reply in REPLIES.items()]  # type: ignore[index]
    assert [asked_and_replied(chat, example) for example in examples] == expected * 2
    assert {example.source for example in examples} == {"rows:1"}
    assert {example.step_replies for example in examples} == {()}
    assert len(set(SYSTEM_PROMPTS.values())) == 3


@pytest.mark.parametrize(
    ("answer", "written"),
    [("1,200", "1200"), ("-1,234,567.50", "-1234567.50"), ("$1,200", "$1200"), ("(1,200)", "(1,200)")],
)
def test_short_replies_write_numbers_as_equations_do(answer: str, written: str) -> None:
    """GSM8K annotates 1200 and answers 1,200."""
    problem = Problem("Q?", f"It is \\boxed{{{answer}}}", "rows:1", ("48*25=1200",), ("1200",))

    assert problem.reply("none") == f"\\boxed{{{written}}}"
    assert problem.reply("equations") == f"48*25=1200\n\\boxed{{{written}}}"
    assert problem.reply("full") == problem.solution


def test_a_problem_with_work_of_its_own_is_asked_so_once(chat: ChatFormat) -> None:
    (mental,) = load_problems("synthetic:mental", split="train", seed=0, num_problems=1)
    (example,) = encode_problems([mental], chat, 1024, ("worked", "equations"))

    assert asked_and_replied(chat, example) == (SYSTEM_PROMPTS["none"], f"\\boxed{{{mental.answer}}}")


@pytest.mark.parametrize("columns", [{}, {"equations": ["2+2=4", "4+1=5"]}, {"steps": ["5"]}])
def test_a_row_of_equations_is_its_own_reply(
    columns: dict[str, Any], jsonl: Callable[..., Path], chat: ChatFormat
) -> None:
    row = {"question": "2+3?", "answer": "2 pens + 2 pens = 4\n4 + 1 = 5\n\\boxed{5}", "work": "equations"}
    [problem] = load_problems(str(jsonl(row | columns)), split="train", seed=0)

    (example,) = encode_problems([problem], chat, 1024, ("worked", "answer"))

    reply = "2+2=4\n4+1=5\n\\boxed{5}" if "equations" in columns else row["answer"]
    assert asked_and_replied(chat, example) == (SYSTEM_PROMPTS["equations"], reply)
    assert asked_work([problem], ("worked",)) == ["equations"]
    assert problem.steps == (("5",) if "steps" in columns else ("4", "5"))


def test_a_row_of_equations_without_one_is_counted(
    jsonl: Callable[..., Path], chat: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    texts = r"2+3=5 \boxed{5}", r"So $\boxed{5}$", "It = <<2+3=5>>5\n#### 5", "2+3=5\n#### 5"
    rows = [{"question": "2+3?", "answer": text, "work": "equations"} for text in texts]

    examples = encode_problems(load_problems(str(jsonl(*rows)), split="train", seed=0), chat, 1024)

    assert [asked_and_replied(chat, example)[1] for example in examples] == ["2+3=5\n\\boxed{5}"] * 3
    assert "1 of 4 training problems have no equations, so no reply of equations alone" in caplog.text


@pytest.mark.parametrize("work", ["some", 3, ["none"], {}, True])
def test_work_of_another_kind_is_reported_with_its_line(
    work: Any, jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"question": "2+3?", "answer": r"\boxed{5}", "work": kind} for kind in ("none", None, work)]
    path = jsonl(*rows)

    loaded = load_problems(str(path), split="train", seed=0)

    assert [problem.work for problem in loaded] == ["none", None]
    assert f"{path}:3: work is {work!r}, not one of full, equations, none; row left out" in caplog.text


def test_problems_without_equations_are_counted(chat: ChatFormat, caplog: pytest.LogCaptureFixture) -> None:
    bare = Problem("Q?", "\\boxed{5}", "rows:2")
    with caplog.at_level(logging.WARNING):
        examples = encode_problems([TWO_STEPS, bare, bare], chat, 1024, ("equations", "answer"))

    assert len(examples) == 1 + 3
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 training problems have no equations, so no reply of equations alone"
    ]
    with pytest.raises(
        ConfigError, match=r"--replies equations: no training problem has equations .*; add worked or answer"
    ):
        encode_problems([bare], chat, 1024, ("equations",))


def test_only_answers_at_once_get_the_replies_of_intermediate_results(chat: ChatFormat) -> None:
    examples = encode_problems([TWO_STEPS], chat, 1024, ("worked", "equations", "answer"), step_targets=True)

    assert [[chat.decode(reply) for reply in example.step_replies] for example in examples] == [[], [], ["\\boxed{19}"]]
    other = chat.encode_example(TWO_STEPS.question, "\\boxed{19}", "none")
    assert examples[2].step_replies == (other.ids[other.label_start :],)
    assert examples[:2] == encode_problems([TWO_STEPS], chat, 1024, ("worked", "equations"))


def test_problems_without_steps_are_counted_and_those_at_odds_named(
    chat: ChatFormat, caplog: pytest.LogCaptureFixture
) -> None:
    at_odds = [Problem("Q?", "\\boxed{6}", f"rows:{n}", ("2+3=5",)) for n in range(11)]
    rows = [TWO_STEPS, Problem("Q?", "\\boxed{5}", "rows:bare"), *at_odds]
    with caplog.at_level(logging.WARNING):
        encode_problems(rows, chat, 1024, ("answer",), step_targets=True)
        encode_problems(rows, chat, 1024, ("worked",), step_targets=True)

    assert [record.getMessage() for record in caplog.records] == [
        "12 of 13 training problems have no steps and learn the answer at every supervision step; the equations of "
        f"11 end in another result than the answer: {', '.join(f'rows:{n}' for n in range(10))}, …"
    ]


def test_the_fingerprint_knows_the_targets_of_steps(chat: ChatFormat) -> None:
    def of(step_targets: bool, *results: str) -> str:
        problem = Problem("Q?", "\\boxed{5}", "", steps=results)
        return fingerprint([encode_problem(problem, chat, "none", step_targets)])

    assert of(False, "19", "5") == of(True, "5") == of(True)
    assert len({of(True, "5"), of(True, "19", "5"), of(True, "18", "5"), of(True, "1", "9", "5")}) == 4


def test_the_fingerprint_of_data_without_steps_is_what_it_was() -> None:
    """Runs of before can be resumed, and their states on the disk found."""
    assert fingerprint([Example((1, 2, 3), 1), Example((4, 5), 1)]) == "b148e1af8eb1d13b"
