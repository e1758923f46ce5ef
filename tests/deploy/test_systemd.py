"""deploy/systemd/trm-serve.service: systemd takes it, and it says what trm-serve understands."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.draining import LAST_WORDS_S
from server.settings import ServeSettings

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "trm-serve.service"
EXPOSURE = 20  # tenths; what is left is what a server on a network needs


def directives(name: str) -> list[str]:
    """The values of a directive, in order."""
    lines = (line.partition("=") for line in UNIT.read_text().splitlines() if not line.startswith("#"))
    return [value for key, _, value in lines if key == name]


@pytest.fixture
def analyze(tmp_path: Path) -> list[str]:
    """systemd-analyze, and a copy of the unit whose program exists."""
    program = shutil.which("systemd-analyze")
    assert program, "systemd-analyze is missing; install Debian's package systemd"
    command = str(Path(sys.executable).with_name("trm-serve"))
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/qwen-trm/bin/trm-serve", command))
    return [program, str(copy)]


def test_systemd_takes_it(analyze: list[str]) -> None:
    program, unit = analyze

    done = subprocess.run([program, "verify", unit], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert UNIT.name not in done.stderr, done.stderr  # unknown directives are warnings only


def test_it_exposes_little(analyze: list[str]) -> None:
    program, unit = analyze

    command = [program, "security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout


def test_its_flags_are_flags_of_the_server(tmp_path: Path) -> None:
    (start,) = directives("ExecStart")
    (tmp_path / "serve.yaml").write_text("port: 8001\n")
    command, *arguments = shlex.split(start.replace("/etc/qwen-trm", str(tmp_path)))

    settings = ServeSettings.from_command_line(arguments)

    assert command.endswith("/trm-serve")
    assert (settings.port, settings.exit_on_failure, settings.log_format) == (8001, True, "json")


def test_a_server_may_drain_before_it_is_killed() -> None:
    (patience,), (signal,) = directives("TimeoutStopSec"), directives("KillSignal")

    assert int(patience) > ServeSettings().drain_seconds + LAST_WORDS_S
    assert signal == "SIGTERM"


def test_a_failed_server_is_started_again_and_a_wrong_setting_is_not() -> None:
    assert directives("Restart") == ["on-failure"]
    assert directives("RestartPreventExitStatus") == ["2"]  # tests/server/test_settings.py: what a wrong setting gives


def test_what_a_gpu_needs_leaves_its_devices_open() -> None:
    """DevicePolicy=auto opens them only where no DeviceAllow is given, and ProtectClock=yes implies one."""
    found = re.search(r"drop-in has to say: (.+?)\.", UNIT.read_text())
    assert found is not None
    says = dict(word.split("=") for word in found[1].split(", "))

    assert says == {"PrivateDevices": "no", "DevicePolicy": "auto", "ProtectClock": "no"}
    assert directives("DeviceAllow") == []
