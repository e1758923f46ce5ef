"""Loading problems: every format, every bad row, and no row lost in silence."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import shared_path
from training.batches import IGNORE_INDEX, collate, epoch_order
from training.problems.data import encode_problems, load_problems
from trm.answers import extract_boxed
from trm.chat import ChatFormat, solve_messages
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


@pytest.mark.parametrize("rows", [(), ("{}",)], ids=["empty", "all bad"])
def test_a_file_without_a_good_row_is_an_error(jsonl: Jsonl, rows: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no usable row"):
        load(jsonl(*rows))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "gsm9k"])
def test_a_missing_file_names_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError, match="no such file, and not one of gsm8k, numina, math, synthetic"):
        load(name)


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
    assert f"{30 - len(kept)} of 30 rows are longer" in caplog.text
    with pytest.raises(ConfigError, match=f"the shortest has {lengths[0]} tokens"):
        encode_problems(rows, chat, max_length=5)


def test_labels_are_the_reply_and_its_end_token(chat: ChatFormat) -> None:
    example = chat.encode_example("1 + 1?", r"1+1=2" + "\n" + r"\boxed{2}")
    batch = collate([example, chat.encode_example("And 2 + 2 and so on?", r"\boxed{4}")], pad_id=0)
    row = batch.labels[0]
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
    for problem in problems[::500]:
        example = chat.encode_example(problem.question, problem.solution)
        assert example.ids[-1] == chat.end_id
