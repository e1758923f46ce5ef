"""Real processes: `trm-serve` on a free port, as a user starts it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

COMMANDS = Path(sys.executable).parent
START_TIMEOUT_S = 120


class ServerProcess:
    """A running `trm-serve`; its log goes to a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        command = [str(COMMANDS / "trm-serve"), "--port", "0", *arguments]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=clean_environment())
        self.url = self._wait()

    def _wait(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if found := re.search(r'serving \S+ on (http://[^\s"]+)', self.log.read_text()):
                url = found[1]
                while time.monotonic() < deadline:
                    try:
                        if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                            return url
                    except httpx.TransportError:
                        time.sleep(0.05)
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"trm-serve did not start:\n{self.log.read_text()}")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=60)


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of ours, and without a way to any hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRM_")}
    return kept | {"HF_HUB_OFFLINE": "1"}


def run_command(name: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run one of our commands to its end."""
    return subprocess.run(
        [str(COMMANDS / name), *arguments], capture_output=True, text=True, timeout=timeout, env=clean_environment()
    )


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    started: list[ServerProcess] = []

    def start(*arguments: str) -> ServerProcess:
        started.append(ServerProcess(list(arguments), tmp_path_factory.mktemp("server") / "log.txt"))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """The bundled model, served."""
    return start_server()
