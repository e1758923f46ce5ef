"""SIGTERM ends a real server process in the time that it promises, whatever hangs inside of it."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.draining import LAST_WORDS_S
from server.ending import GRACE_S
from tests.e2e.conftest import ServerProcess
from tests.waiting import wait_for

Start = Callable[..., ServerProcess]
DRAIN_S = 2
SLACK_S = 3  # other tests share the cores
CHAT = {"messages": [{"role": "user", "content": "How many?"}]}

HANG = """
import time
from pathlib import Path
def hang(*args, **kwargs):
    Path({file!r}).touch()
    time.sleep(1000)
"""
STEP_HANGS = HANG + "from trm.engine.runner import Runner\nRunner.tick = hang"
TOKENISING_HANGS = HANG + "from trm.chat import ChatFormat\nChatFormat.encode = hang"
LOADING_HANGS = "import time\nfrom server import cli\ncli.load_engine = lambda settings: time.sleep(1000)"
HANGS_AT_TORCH = """
import sys
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            hang()
sys.meta_path.insert(0, Slow())
"""
IMPORT_HANGS = HANG + HANGS_AT_TORCH


def post_in_thread(url: str) -> tuple[threading.Thread, list[httpx.Response]]:
    told: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: told.append(httpx.post(url, json=CHAT, timeout=60)), daemon=True)
    thread.start()
    return thread, told


def terminate(server: ServerProcess, limit_s: float) -> tuple[int, float]:
    """The exit status, and after how long it came."""
    began = time.monotonic()
    server.process.terminate()
    try:
        status = server.process.wait(timeout=limit_s)
    finally:
        server.process.kill()  # nothing happens to one that has ended
    return status, time.monotonic() - began


def test_an_idle_server_stops_at_once(start_server: Start) -> None:
    server = start_server()

    status, took_s = terminate(server, 10)

    assert status == 0
    assert took_s < 2
    assert "stopped" in server.log.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("hang", "culprit"), [(STEP_HANGS, "trm-engine"), (TOKENISING_HANGS, "_0 in hang")], ids=["step", "tokenising"]
)
def test_what_hangs_is_left_behind_and_named(start_server: Start, tmp_path: Path, hang: str, culprit: str) -> None:
    """Long before the step counts as one of a device that hangs."""
    file = tmp_path / "hangs"
    server = start_server("--drain-seconds", str(DRAIN_S), before=hang.format(file=str(file)))
    client, told = post_in_thread(f"{server.url}/v1/chat/completions")
    wait_for(file.exists)

    status, took_s = terminate(server, DRAIN_S + LAST_WORDS_S + GRACE_S + SLACK_S)
    client.join(5)

    assert status == 1
    assert took_s >= DRAIN_S
    (response,) = told
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    last = server.log.read_text().splitlines()[-1]
    assert culprit in last, last


def test_a_hanging_device_ends_the_server_that_is_told_to_exit_on_failure(start_server: Start, tmp_path: Path) -> None:
    hang = STEP_HANGS.format(file=str(tmp_path / "hangs"))
    server = start_server("--max-step-seconds", "1", "--exit-on-failure", before=hang)

    httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=60)

    assert server.process.wait(timeout=LAST_WORDS_S + GRACE_S + SLACK_S) == 1
    assert "the engine failed" in server.log.read_text()


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("hangs_in", ["the imports", "loading"])
def test_a_server_that_starts_stops_at_once(
    start_server: Start, tmp_path: Path, hangs_in: str, signal_: signal.Signals
) -> None:
    file = tmp_path / "importing"
    before = IMPORT_HANGS.format(file=str(file)) if hangs_in == "the imports" else LOADING_HANGS
    server = start_server(before=before, ready=False)
    if hangs_in == "the imports":
        wait_for(file.exists)
    else:
        server.url_in(r'loading \S+; (http://[^\s"]+) answers 503')

    server.process.send_signal(signal_)

    try:
        assert server.process.wait(timeout=SLACK_S) == 0
    finally:
        server.process.kill()
    last: Any = server.log.read_text().splitlines()[-1]
    assert "stopping now" in last, last
