"""The command line of `trm-bench`: light until it measures, and each benchmark takes its own settings only."""

import subprocess
import sys

import pytest

from server.bench.cli import BENCHMARKS, read_command_line
from trm import extra
from trm.errors import ConfigError

HEAVY = {"torch", "transformers", "numpy", "matplotlib", "tokenizers", "fastapi", "psutil"}
HELP = f"""
import sys
from server.bench.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
print("heavy:", sorted({HEAVY} & sys.modules.keys()))
"""


@pytest.mark.parametrize("benchmark", [[], *([name] for name in BENCHMARKS)], ids=str)
def test_help_imports_nothing_heavy(benchmark):
    done = subprocess.run(
        [sys.executable, "-c", HELP, *benchmark, "--help"], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" ".join(["usage: trm-bench", *benchmark, "[-h]"]))
    assert "--version" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_the_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        read_command_line(["--help"])

    words = " ".join(capsys.readouterr().out.split())
    for name, settings in BENCHMARKS.items():
        assert f"{name} {settings.__doc__}" in words


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_benchmark_takes_its_own_settings(benchmark):
    assert read_command_line([benchmark, "--seed", "3"]) == (benchmark, BENCHMARKS[benchmark](seed=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: BENCHMARK"),
        (["--seed", "3"], "the following arguments are required: BENCHMARK"),
        (["nap"], "invalid choice: 'nap'"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_without_a_benchmark_nothing_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        read_command_line(arguments)

    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["soak", "--full"], ["soak", "--num-requests", "4"], ["serve", "--minutes", "1"]], ids=" ".join
)
def test_what_a_benchmark_does_not_read_is_refused(arguments):
    with pytest.raises(ConfigError, match=f"^{arguments[1]}: no such flag"):
        read_command_line(arguments)


def test_a_file_may_not_hold_what_a_benchmark_does_not_read(tmp_path):
    (tmp_path / "settings.yaml").write_text("full: true\n")

    assert read_command_line(["decode", "--config", str(tmp_path / "settings.yaml")])[1].full
    with pytest.raises(ConfigError, match="unknown setting 'full'"):
        read_command_line(["soak", "--config", str(tmp_path / "settings.yaml")])


def test_a_report_without_matplotlib_is_refused_before_the_soak(monkeypatch, tmp_path):
    monkeypatch.setattr(extra, "find_spec", lambda name: None)

    assert read_command_line(["soak"])[1].report is None
    with pytest.raises(ConfigError, match="--report needs matplotlib, which is not installed"):
        read_command_line(["soak", "--report", str(tmp_path)])
