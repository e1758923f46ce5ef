"""The script that measures a GPU, where there is none: every section at tiny sizes, and what befalls sections."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import measure_agreement, measure_block, measure_training, measures, run, section
from tests.gpu.measure_engine import shares
from tests.gpu.report import Report
from tests.waiting import wait_for
from trm import bundled_model_path

ROOT = Path(__file__).parents[1]
PUT = (
    "from tests.gpu.report import Report; from pathlib import Path; Report(Path({path!r})).put({name!r}, 'number', 1); "
)

on_cpu = pytest.mark.skipif(measures.ON_GPU, reason="with a GPU its sizes are full: python -m tests.gpu.run")


def found_under(value: Any, key: str) -> Iterator[Any]:
    """All that lies under a key, however deep."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name == key:
                yield part
            yield from found_under(part, key)
    elif isinstance(value, list):
        for part in value:
            yield from found_under(part, key)


def one_test(directory: Path, body: str) -> str:
    """A file of one test."""
    path = directory / "test_one.py"
    path.write_text(f"def test_one():\n    {body}\n")
    return str(path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One test, few repeats, little depth, and a compiler that compiles nothing."""
    monkeypatch.setattr(section, "TESTS", [one_test(tmp_path, "pass")])
    monkeypatch.setattr(measure_agreement, "QUESTIONS", 1)
    monkeypatch.setattr(measure_agreement, "TOKENS", 4)
    monkeypatch.setattr(measures, "REPEATS", 1)
    monkeypatch.setattr(measures, "LAUNCHES", 2)
    for depth in measures.DEPTHS.values():
        monkeypatch.setitem(depth, "n_supervision", 2)
        monkeypatch.setitem(depth, "n_cycles", 1)
    monkeypatch.setattr(measure_block, "COMPILE", measure_block.COMPILE | {"backend": "eager"})
    monkeypatch.setattr(measure_training, "ANSWER", 2)


@on_cpu
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", run.SECTIONS)
def test_every_section_runs_to_its_end(tmp_path, name):
    report = Report(tmp_path / "gpu.json")

    section.measure(report.path, name, bundled_model_path())

    found = report.read()
    assert found["machine"]["measured_on_a_gpu"] is False
    assert "mean nothing" in found["machine"]["device"]
    assert len(found[name]) >= 2
    assert list(found_under(found, "failed")) == []
    assert list(found_under(found, "skipped")) == []
    targets = [line for line in walk(found) if "target" in line]
    assert all(line.keys() >= {"target", "measured", "met"} for line in targets)
    if name not in ("tests", "card", "block"):
        assert targets


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries, however deep."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(part)


def test_tests_that_fail_are_a_section_that_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(section, "TESTS", [one_test(tmp_path, "assert 1 == 2")])
    report = Report(tmp_path / "gpu.json")

    with pytest.raises(RuntimeError, match="pytest ended with status"):
        section.measure(report.path, "tests", None)

    found = report.read()["tests"]
    assert found["status"] == 1
    assert "test_one" in found["last"]
    assert any("assert 1 == 2" in line for line in found["end"])


def test_a_part_that_fails_does_not_stop_the_others():
    found: dict[str, Any] = {}

    assert measures.attempt(found.__setitem__, "wrong", lambda: 1 / 0) is None
    assert measures.attempt(found.__setitem__, "right", lambda: 1) == 1

    assert found["wrong"]["failed"][-1] == "ZeroDivisionError: division by zero"
    assert found["right"] == 1


def commands(path: Path, **codes: str) -> Callable[[str, float], Sequence[str]]:
    """Sections that are a line of Python, which has put down a number before."""
    return lambda name, seconds: [sys.executable, "-c", PUT.format(path=str(path), name=name) + codes[name]]


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "DYING_S", 0.2)
    return Report(tmp_path / "gpu.json")


def test_a_section_that_fails_does_not_stop_the_next_one(report):
    done = run.run(["bad", "good"], report, commands(report.path, bad="1 / 0", good="pass"))

    found = report.read()
    assert not done
    assert (found["bad"]["state"], found["bad"]["number"], found["bad"]["status"]) == ("failed", 1, 1)
    assert "ZeroDivisionError" in found["bad"]["failed"][-1]
    assert (found["good"]["state"], found["good"]["number"]) == ("done", 1)


def test_a_section_that_hangs_is_stopped_with_what_it_has(report, monkeypatch):
    monkeypatch.setitem(run.SECTIONS, "bad", 5.0)  # a busy machine takes its time to begin
    codes = commands(report.path, bad="print('before', flush=True); import time; time.sleep(60)", good="pass")
    began = time.monotonic()

    done = run.run(["bad", "good"], report, codes)

    found = report.read()
    assert time.monotonic() - began < 30
    assert not done
    assert (found["bad"]["state"], found["bad"]["number"]) == ("stopped", 1)
    assert found["bad"]["stopped"] == ["before"]
    assert found["good"]["state"] == "done"


def test_a_real_section_that_hangs_says_where(report, monkeypatch):
    monkeypatch.setitem(run.SECTIONS, "card", 300.0)  # it ends by itself, however long its imports take

    def command(name: str, seconds: float) -> list[str]:
        code = "import sys, time, tests.gpu.section as s; s.measure = lambda *_: time.sleep(60); s.main()"
        return [sys.executable, "-c", code, str(report.path), name, "0.5"]

    run.run(["card"], report, command)

    found = report.read()["card"]
    assert found["state"] == "failed"
    assert any("Timeout" in line for line in found["failed"])


def test_sections_that_would_begin_after_the_limit_are_left_out(report, monkeypatch):
    monkeypatch.setitem(run.SECTIONS, "first", 30.0)
    codes = commands(report.path, first="import time; time.sleep(0.3)", late="pass")

    done = run.run(["first", "late"], report, codes, limit_s=0.1)

    found = report.read()
    assert not done
    assert found["first"]["state"] == "done"
    assert found["late"] == {"state": "skipped", "skipped": "it would begin after the limit of 0.1 s"}


def test_a_script_that_is_ended_leaves_no_section_behind(report):
    command = [sys.executable, "-m", "tests.gpu.run", str(report.path), "--sections", "card"]
    with subprocess.Popen(command) as script:
        try:
            wait_for(lambda: script.poll() is not None or children(script.pid))
            sections = [Path(f"/proc/{pid}") for pid in children(script.pid)]
        finally:
            script.terminate()

    assert sections
    assert script.returncode == 143
    assert not any(section.exists() for section in sections)


def children(pid: int) -> list[str]:
    """Processes that one has started."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_the_file_is_there_while_a_section_runs(report):
    """Whoever is killed then leaves it: the section before is in it, and the one that runs says so."""
    code = f"import json; found = json.load(open({str(report.path)!r})); assert found['one']['state'] == 'done'; "
    code += "assert found['two']['state'] == 'running'; assert found['three']['state'] == 'not begun'"

    assert run.run(["one", "two", "three"], report, commands(report.path, one="pass", two=code, three="pass"))


def test_the_command_chooses_sections_and_passes_the_model_on(tmp_path, monkeypatch):
    asked: list[Any] = []

    def fake(names: Sequence[str], report: Report, command: Callable[[str, float], Sequence[str]]) -> bool:
        asked.extend([names, report.path, command(names[0], 5.0)[1:]])
        return True

    monkeypatch.setattr(run, "run", fake)

    run.main([str(tmp_path / "a.json"), "--model", "mine", "--sections", "training", "card"])

    path = tmp_path / "a.json"
    assert asked == [["card", "training"], path, ["-m", "tests.gpu.section", str(path), "card", "5.0", "mine"]]


def test_the_command_ends_with_an_error_that_names_what_is_not_done(tmp_path, monkeypatch):
    def fake(names: Sequence[str], report: Report, command: object) -> bool:
        report.write({"card": {"state": "failed"}, "block": {"state": "done"}})
        return False

    monkeypatch.setattr(run, "run", fake)

    with pytest.raises(SystemExit, match="card failed") as ended:
        run.main([str(tmp_path / "a.json"), "--sections", "card", "block"])
    assert "block" not in str(ended.value)


def test_sections_have_their_names():
    assert list(section.sections(lambda name, value: None, {}, None)) == list(run.SECTIONS)


def test_idle_time_is_what_no_kernel_covers():
    """Kernels may overlap; short gaps are those between kernels of one launch."""
    found = shares([(50, 60), (0, 10), (5, 20), (22, 40), (90, 100)])

    assert found == {"idle_share": pytest.approx(0.42), "waiting_share": pytest.approx(0.4)}
    assert shares([]) == {"idle_share": None, "waiting_share": None}


def test_the_report_is_json(report):
    report.put("card", "agree", {4: 0.5})
    report.put("card", "more", [1.5, None])

    assert json.loads(report.path.read_text()) == {"card": {"agree": {"4": 0.5}, "more": [1.5, None]}}
