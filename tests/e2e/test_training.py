"""From rows on disk to a served checkpoint, through the commands that the README names."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import COMMANDS, START_TIMEOUT_S, ServerProcess, clean_environment, run_command
from tests.training.comparing import differing_tensors
from training.config import TrainSettings
from training.run import train

pytestmark = pytest.mark.slow

ROWS = [
    {
        "question": f"Ann has {n} pens and buys {n + 1} more. How many pens does she have?",
        "answer": f"{n}+{n + 1}={2 * n + 1}\n#### {2 * n + 1}",
    }
    for n in range(2, 18)
]
SMALL = ("--n-latent", "1", "--n-cycles", "1", "--n-supervision", "2", "--max-steps", "4", "--save-steps", "2")


def test_train_resume_evaluate_serve(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> None:
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    trained = run_command("trm-train", "--dataset", str(rows), "--output-dir", str(run), *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.strip() == str(run / "checkpoint-4")
    weights = (run / "checkpoint-4" / "model.safetensors").read_bytes()

    resumed = run_command("trm-train", "--resume", str(run / "checkpoint-2"))
    assert resumed.returncode == 0, resumed.stderr
    assert (run / "checkpoint-4" / "model.safetensors").read_bytes() == weights

    evaluated = run_command(
        "trm-eval", "--model", str(run / "checkpoint-4"), "--dataset", str(rows), "--limit", "8", "--effort", "0", "2",
        "--max-tokens", "32", "--report", str(tmp_path / "report"),
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    assert "effort 0 (baseline)" in evaluated.stdout
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["effort"] for row in report["efforts"]] == [0, 2]

    server = start_server("--model", str(run / "checkpoint-4"))
    answer = httpx.post(f"{server.url}/solve", json={"question": ROWS[0]["question"]}, timeout=60)
    assert answer.status_code == 200


def test_a_terminated_evaluation_keeps_its_answers(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    arguments = ["--dataset", "synthetic:easy", "--limit", "1000", "--report", str(tmp_path), "--num-threads", "1"]
    command = [str(COMMANDS / "trm-eval"), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=clean_environment()) as process:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (answers.exists() and answers.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        _, errors = process.communicate(timeout=60)

    kept = len(answers.read_text().splitlines())
    assert process.returncode == 128 + signal.SIGTERM
    assert f"interrupted after {kept} of 3000 answers; they are kept in {tmp_path}" in errors
    assert "Traceback" not in errors


def test_a_sampling_that_is_stopped_and_killed_ends_in_the_same_rows(tmp_path: Path) -> None:
    """SIGTERM, Ctrl-C and SIGKILL, each while replies come in; then to the end."""
    small = ("--dataset", "synthetic", "--limit", "200", "--temperature", "1.5", "--max-tokens", "64")
    small += ("--num-threads", "1")
    whole, rows, replies = (tmp_path / name for name in ("whole.jsonl", "rows.jsonl", "rows.jsonl.replies"))
    straight = run_command("trm-sample", *small, "--output", str(whole))
    assert straight.returncode == 0, straight.stderr
    assert whole.stat().st_size

    for number, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = replies.stat().st_size if replies.exists() else 0
        process = start_command("trm-sample", *small, "--output", str(rows))
        assert wait_until(lambda size=before: replies.exists() and replies.stat().st_size > size, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == status, said
        assert ("the same command goes on from there" in said) == (number != signal.SIGKILL)
        assert "Traceback" not in said
        assert whole.read_bytes().startswith(rows.read_bytes())
    last = run_command("trm-sample", *small, "--output", str(rows), "--max-rows", "5")

    assert last.returncode == 0, last.stderr
    assert rows.read_bytes() == whole.read_bytes()
    assert last.stdout.splitlines()[0] == straight.stdout.splitlines()[0]


def test_bad_training_input_is_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for arguments, message in (
        (("--dataset", str(empty)), "no usable row"),
        (("--dataset", "synthetic", "--lr", "-1"), "--lr"),
    ):
        done = run_command("trm-train", "--output-dir", str(tmp_path / "run"), *arguments)
        assert done.returncode != 0
        assert message in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_run_is_stopped_killed_and_resumed_by_its_directory(tmp_path: Path) -> None:
    """The real command, on the bundled backbone: SIGTERM, then SIGKILL while it saves, then to the end."""
    small = ("--n-latent", "1", "--n-cycles", "1", "--n-supervision", "2", "--gradient", "paper", "--num-threads", "1")
    small += ("--dataset", "synthetic:easy", "--num-problems", "80", "--validation-problems", "4", "--batch-size", "2")
    small += ("--max-steps", "60", "--save-steps", "5")
    straight = train(TrainSettings.from_command_line((*small, "--output-dir", str(tmp_path / "straight"))))
    run = tmp_path / "run"

    first = start_command("trm-train", *small, "--output-dir", str(run))
    assert wait_until(lambda: (run / "checkpoint-5").exists(), first)
    first.terminate()
    _, said = first.communicate(timeout=60)
    assert first.returncode == 0, said
    assert f"go on with: trm-train --resume {run}" in said
    for _ in range(5):  # a kill may come just after what it should have torn
        second = start_command("trm-train", "--resume", str(run))
        assert wait_until(lambda: list(run.glob(".checkpoint-*.partial")), second)
        second.kill()
        second.communicate(timeout=60)
        if list(run.glob(".checkpoint-*.partial")):
            break
    assert list(run.glob(".checkpoint-*.partial")), "no kill fell into a save"
    third = run_command("trm-train", "--resume", str(run))

    assert third.returncode == 0, third.stderr
    assert third.stdout.strip() == str(run / straight.name)
    assert differing_tensors(run / straight.name, straight) == []


def start_command(name: str, *arguments: str) -> subprocess.Popen[str]:
    command = [str(COMMANDS / name), *arguments]
    pipe = subprocess.PIPE
    # As in the background of a shell; a child would ignore it too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=clean_environment())


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> bool:
    """Whether the condition came true while the process was running, within two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False
