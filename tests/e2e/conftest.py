"""Real processes: `trm-serve` on a free port, as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.waiting import wait_for

COMMANDS = Path(sys.executable).parent
START_TIMEOUT_S = 120
MARK = "/mark"  # no route: its line in the log comes after those of all requests before it


class ServerProcess:
    """A running `trm-serve`; its log goes to a file. `before`: Python to be run in its process first."""

    def __init__(self, arguments: list[str], log: Path, before: str = "", port: int = 0) -> None:
        self.log = log
        command = [str(COMMANDS / "trm-serve")]
        if before:
            command = [sys.executable, "-c", f"{before}\nfrom server.cli import main\nmain()"]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "--port", str(port), *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=clean_environment(),
            )

    def url_in(self, line: str) -> str:
        """Wait for a line of the log, a regular expression, and take the address out of it."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(line, self.log.read_text()):
                return found[1]
            time.sleep(0.05)
        raise AssertionError(f"trm-serve did not start:\n{self.log.read_text()}")

    @cached_property
    def url(self) -> str:
        """Where it serves; waits until it does."""
        return self.url_in(r'serving \S+ on (http://[^\s"]+)')

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What the log says of each request that has been answered.

        A line is written after its reply. So a server that still runs is asked once more, for that line to come.
        """
        if self.process.poll() is None:
            mark = httpx.get(f"{self.url}{MARK}", timeout=START_TIMEOUT_S).headers["x-request-id"]
            wait_for(lambda: mark in self.log.read_text())
        lines = map(json.loads, self.log.read_text().splitlines())
        return [line for line in lines if line["logger"] == "server.middleware" and line["path"] != MARK]

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}[ {{]", line))

    def stop(self) -> int:
        """SIGTERM, as a supervisor sends it; what outlives that for a minute is killed, and the test fails."""
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)  # for one that a failed test has left frozen
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of ours, and without a way to any hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRM_")}
    return kept | {"HF_HUB_OFFLINE": "1"}


def run_command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of our commands to its end."""
    return subprocess.run(
        [str(COMMANDS / name), *arguments], capture_output=True, text=True, timeout=300, env=clean_environment()
    )


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    with ExitStack() as stopping:  # each of them, whatever becomes of another

        def start(*arguments: str, before: str = "", ready: bool = True, port: int = 0) -> ServerProcess:
            log = tmp_path_factory.mktemp("server") / "log.txt"
            server = ServerProcess(list(arguments), log, before, port)
            stopping.callback(server.stop)
            if ready:
                assert server.url
            return server

        yield start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """The bundled model, served."""
    return start_server()


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """OpenAI's own."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
