"""Processes that a command starts end with it, whenever a signal comes."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from trm.processes import SIGNALS, child_process

SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]


class Ended(BaseException):
    """What a handler raises."""


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def raising() -> Iterator[None]:
    def handler(number: int, frame: object) -> None:
        raise Ended

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    yield
    for number, its in before.items():
        signal.signal(number, its)


@pytest.mark.usefixtures("raising")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_it_starts_leaves_no_process_behind(number, monkeypatch):
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            started.append(self)
            signal.raise_signal(number)  # the process is there, and its caller has not got it yet

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    process = child_process(SLEEPS, end)

    with pytest.raises(Ended):
        process.__enter__()

    assert started[0].returncode == -signal.SIGKILL
    with pytest.raises(Ended):  # the handlers are back
        signal.raise_signal(number)


@pytest.mark.usefixtures("raising")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_later_leaves_no_process_behind(number):
    with pytest.raises(Ended), child_process(SLEEPS, end) as process:
        signal.raise_signal(number)

    assert process.returncode == -signal.SIGKILL


@pytest.mark.usefixtures("raising")
def test_signals_are_not_kept_from_the_process():
    with child_process(SLEEPS, end) as process:
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM


@pytest.mark.usefixtures("raising")
def test_one_that_does_not_start_has_no_end():
    before = [signal.getsignal(number) for number in SIGNALS]
    process = child_process(["/no/such/command"], lambda _: pytest.fail("nothing to end"))

    with pytest.raises(FileNotFoundError):
        process.__enter__()

    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_thread_may_start_one():
    found: list[int | None] = []

    def run() -> None:
        with child_process(SLEEPS, end) as process:
            found.append(process.poll())
        found.append(process.returncode)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)

    assert found == [None, -signal.SIGKILL]
