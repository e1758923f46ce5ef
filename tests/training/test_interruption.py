"""P6: a run that is killed anywhere, and resumed, ends in the bits of one that was left alone."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.comparing import differing_tensors
from training.checkpoints import checkpoints, step_of
from training.config import TrainSettings
from training.run import train
from trm.errors import ConfigError

pytestmark = pytest.mark.slow

Settings = Callable[..., TrainSettings]

TIMEOUT_S = 60
STEPS = 20


@pytest.fixture
def start() -> Iterator[Callable[[TrainSettings], Any]]:
    """Start a run in a process that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.run"])
    started: list[Any] = []

    def start(settings: TrainSettings) -> Any:
        started.append(context.Process(target=train, args=(settings,)))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()


def wait_for(condition: Callable[[], Any], process: Any) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.is_alive():
        if found := condition():
            return found
        time.sleep(0.0005)
    return None


def partial(run: Path) -> set[str]:
    return {path.name for path in run.glob(".checkpoint-*.partial")}


@pytest.mark.parametrize("gradient", ["full", "paper"])
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(
    settings: Settings, tmp_path: Path, start: Callable[[TrainSettings], Any], gradient: str
) -> None:
    changes = {"gradient": gradient, "max_steps": STEPS, "epochs": 10, "save_steps": 2, "keep_last": 2}
    straight = train(settings(**changes))
    run = tmp_path / "killed"
    moments = random.Random(gradient)
    torn = 0
    for attempt in range(4):
        process = start(TrainSettings(resume=run) if checkpoints(run) else settings(**changes, output_dir=run))
        for _ in range(1 + attempt % 2):  # saves begun
            before = partial(run)
            wait_for(lambda seen=before: partial(run) - seen, process)
        time.sleep(moments.uniform(0, 0.02 if attempt < 2 else 0.1))
        process.kill()
        process.join(TIMEOUT_S)
        torn += bool(partial(run))
        if process.exitcode == 0:
            break

    last = train(TrainSettings(resume=run)) if torn and process.exitcode else checkpoints(run)[-1]

    assert torn, "no kill fell into a save"
    assert last.name == straight.name == f"checkpoint-{STEPS}"
    assert differing_tensors(last, straight) == []
    assert list(run.glob(".checkpoint-*")) == []
    lines = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert lines == sorted(set(lines))
    assert lines[-1] == STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_0(
    settings: Settings, tmp_path: Path, start: Callable[[TrainSettings], Any], number: int
) -> None:
    run = tmp_path / "run"
    process = start(settings(max_steps=100_000, epochs=100_000, save_steps=7))
    assert wait_for(lambda: checkpoints(run), process)
    with pytest.raises(ConfigError, match="another trm-train is at work there"):
        train(TrainSettings(resume=run))

    os.kill(process.pid, number)
    process.join(TIMEOUT_S)

    assert process.exitcode == 0
    record = json.loads((run / "run.json").read_text())
    assert record["step"] == record["last"]["step"] == step_of(checkpoints(run)[-1]) < 100_000
    assert (record["validation"] is not None) == (record["step"] % 7 == 0), "nobody waits for a validation out of turn"
