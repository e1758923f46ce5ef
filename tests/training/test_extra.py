"""Without the libraries of the extra `train`: what does not need them works, what does says what to install."""

import json
import subprocess
import sys
from pathlib import Path

from training.config import EvalSettings, TrainSettings

PROGRAM = """
import json, sys
from importlib import import_module
absent, commands = json.loads(sys.argv[1])
for name in absent:
    sys.modules[name] = None  # what an import then finds is nothing
for function, *arguments in commands:
    sys.argv = [function, *arguments]
    try:
        getattr(import_module("training.cli"), function)()
    except SystemExit as end:
        print("status", end.code, file=sys.stderr)
    else:
        print("status", 0, file=sys.stderr)
"""
INSTALL = "which is not installed; in a clone, run make install"


def run_without(absent: list[str], *commands: list[str]) -> list[str]:
    """What the training commands say at their ends, in one process that has no such libraries."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([absent, commands])], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("status ") == len(commands), done.stderr
    return done.stderr.split("status ")


def test_commands_say_what_is_missing_or_do_without(tmp_path: Path) -> None:
    small = ["--limit", "2", "--effort", "0", "--max-tokens", "2", "--num-threads", "1"]
    said = run_without(
        ["matplotlib", "tensorboard", "datasets", "accelerate"],
        ["evaluate", *small],
        ["evaluate", *small, "--report", str(tmp_path / "report")],
        ["evaluate", *small, "--dataset", "gsm8k"],
        ["train", "--dataset", "synthetic", "--output-dir", str(tmp_path / "run")],
    )

    assert said[1].startswith("0\n"), said[0]
    assert f"{EvalSettings.command}: --report needs matplotlib, {INSTALL}" in said[1]
    assert said[2].startswith("2\n")
    assert f"{EvalSettings.command}: --dataset gsm8k needs datasets, {INSTALL}" in said[2]
    assert f"{TrainSettings.command}: training needs tensorboard, {INSTALL}" in said[3]
    assert list(tmp_path.iterdir()) == []


def test_a_run_needs_neither_datasets_nor_matplotlib_nor_accelerate(tmp_path: Path) -> None:
    small = ["--n-latent", "1", "--n-cycles", "1", "--n-supervision", "1", "--max-steps", "1", "--num-threads", "1"]
    small += ["--dataset", "synthetic:easy", "--num-problems", "8", "--validation-problems", "2"]

    said = run_without(
        ["matplotlib", "datasets", "accelerate"], ["train", *small, "--output-dir", str(tmp_path / "run")]
    )

    assert said[1].startswith("0\n"), said[0]
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
