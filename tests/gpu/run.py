"""Run the tests of a GPU and the measurements, and leave one JSON file.

    python -m tests.gpu.run [gpu.json] [--model CHECKPOINT] [--sections NAME ...]

Meant for one run of less than eight minutes on an H100: sections run in the order of their worth, those that would
begin after 400 s are left out, and none may take the others' time. It was never run on a GPU so far. Without one it
runs to the end at tiny sizes on the CPU, so that mistakes in it are found, and says so: these numbers mean nothing.

Each section is a process (`tests.gpu.section`), whose output goes to a log beside the JSON. Of one that fails or is
stopped the numbers before stay in the file, beside the reason.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.report import Report
from trm.processes import child_process

SECTIONS: dict[str, float] = {
    "tests": 120,
    "card": 30,
    "block": 90,
    "engine-0.5b": 80,
    "engine-1.5b": 100,
    "agreement": 80,
    "training": 60,
    "engine-0.5b-fp8": 60,
    "engine-1.5b-fp8": 60,
}
"""Most seconds of each, in the order of their worth."""
LIMIT_S = 400.0  # after which no section begins
GRACE_S = 50.0  # that one which has begun may take longer
DYING_S = 5.0  # a section ends by itself when its time is over, with its traceback; so much later it is killed
LAST_LINES = 40  # of what a section that failed has said
Command = Callable[[str, float], Sequence[str]]


def run(names: Sequence[str], report: Report, command: Command, limit_s: float = LIMIT_S) -> bool:
    """All sections, one after the other; returns whether every one of them is done.

    `command(name, seconds)` starts one. One that fails does not stop the others.
    """
    began = time.monotonic()
    report.write({name: {"state": "not begun"} for name in names})
    for name in names:
        left = limit_s - (time.monotonic() - began)
        if left <= 0:
            report.put(name, "state", "skipped")
            report.put(name, "skipped", f"it would begin after the limit of {limit_s:g} s")
        else:
            run_one(name, report, command, min(SECTIONS.get(name, limit_s), left + GRACE_S))
        found = report.read()[name]
        parts = [part for part, its in found.items() if isinstance(its, dict) and "failed" in its]
        words = f", but {', '.join(parts)}: failed" if parts else ""
        print(f"{time.monotonic() - began:6.1f} s  {name}: {found['state']}{words}", flush=True)
    return all(report.read()[name]["state"] == "done" for name in names)


def run_one(name: str, report: Report, command: Command, seconds: float) -> None:
    """One section in a process, and how it ended: done, failed or stopped."""
    report.put(name, "state", "running")
    began = time.monotonic()
    log = report.path.with_suffix(".log")
    with log.open("ab") as output:
        start = output.tell()
        pipes = {"stdout": output, "stderr": subprocess.STDOUT}
        with child_process(command(name, seconds), end_group, start_new_session=True, **pipes) as process:
            try:
                status: int | None = process.wait(seconds + DYING_S)
            except subprocess.TimeoutExpired:
                status = None
    took = time.monotonic() - began
    report.put(name, "seconds", round(took, 1))
    state = "done" if status == 0 else "stopped" if took >= seconds else "failed"
    if state != "done":
        report.put(name, "status", status)
        report.put(name, state, log.read_bytes()[start:].decode(errors="replace").splitlines()[-LAST_LINES:])
    report.put(name, "state", state)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a section and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that the driver holds never ends
        process.wait(DYING_S)


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run, and say which sections are not done."""
    parser = argparse.ArgumentParser(description="Tests and measurements of a GPU, into one JSON file.")
    parser.add_argument("report", nargs="?", type=Path, default=Path("gpu.json"), help="JSON file; default gpu.json")
    parser.add_argument("--model", type=Path, help="a checkpoint: agreement and replies of a trained model")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these")
    given = parser.parse_args(words)

    def command(name: str, seconds: float) -> list[str]:
        rest = [] if given.model is None else [str(given.model)]
        return [sys.executable, "-m", "tests.gpu.section", str(given.report), name, str(seconds), *rest]

    names = [name for name in SECTIONS if name in given.sections]  # in the order of their worth
    report = Report(given.report)
    if not run(names, report, command):
        found: dict[str, Any] = report.read()
        left = [f"{name} {found[name]['state']}" for name in names if found[name]["state"] != "done"]
        sys.exit(f"{given.report}: {', '.join(left)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the section that runs ends, too
    main()
