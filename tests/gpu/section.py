"""One section of `tests.gpu.run` in a process of its own, so that a device that breaks or hangs takes no other along.

    python -m tests.gpu.section REPORT NAME SECONDS [CHECKPOINT]

It writes what it finds into the report at once, and ends with its traceback where it takes longer than `SECONDS`.
"""

import faulthandler
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.gpu.measure_agreement import agreement
from tests.gpu.measure_block import block
from tests.gpu.measure_engine import engine
from tests.gpu.measure_training import training
from tests.gpu.measures import DEVICE, ON_GPU, Put, Raw, card
from tests.gpu.report import Report
from trm.device import use_device
from trm.linear import has_fp8

TESTS = [str(Path(__file__).parent)]
LAST_LINES = 60  # of what pytest says


def tests(put: Put) -> None:
    """What pytest says, test by test. Without a GPU those tests run that a CPU can stand for."""
    environment = os.environ if ON_GPU else os.environ | {"TRM_TEST_DEVICE": "cpu"}
    command = [sys.executable, "-m", "pytest", "-vv", "-rs", "--tb=short", "--durations=5", *TESTS]
    lines: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)  # the whole of it is in the log
            lines.append(line.rstrip())
            if "::" in line:  # a test has ended
                put("last", lines[-1])
        status = process.wait()
    put("end", lines[-LAST_LINES:])
    put("status", status)
    if status:
        raise RuntimeError(f"pytest ended with status {status}")


def engine_in_fp8(put: Put, report: Raw, shape: str) -> None:
    """A shape with float8 layers; on a CPU, which has none, with those it has, to find mistakes."""
    if ON_GPU and not has_fp8(DEVICE):
        put("skipped", "this GPU has no float8 products")
        return
    engine(put, report, shape, "fp8" if ON_GPU else None)


def sections(put: Put, report: Raw, checkpoint: Path | None) -> dict[str, Callable[[], object]]:
    """What there is to measure, by the names of `tests.gpu.run.SECTIONS`."""
    return {
        "tests": partial(tests, put),
        "card": partial(card, put),
        "block": partial(block, put, report),
        "engine-0.5b": partial(engine, put, report, "qwen2.5-0.5b"),
        "engine-1.5b": partial(engine, put, report, "qwen2.5-1.5b"),
        "agreement": partial(agreement, put, report, checkpoint),
        "training": partial(training, put, report),
        "engine-0.5b-fp8": partial(engine_in_fp8, put, report, "qwen2.5-0.5b"),
        "engine-1.5b-fp8": partial(engine_in_fp8, put, report, "qwen2.5-1.5b"),
    }


def machine() -> Raw:
    """What the numbers come from."""
    name = torch.cuda.get_device_name(DEVICE) if ON_GPU else "CPU, at tiny sizes: these numbers mean nothing"
    return {"measured_on_a_gpu": ON_GPU, "device": name, "torch": torch.__version__, "cuda": torch.version.cuda}


def measure(path: Path, name: str, checkpoint: Path | None) -> None:
    """One section, into the report at `path`."""
    use_device("auto")  # as every command does
    report = Report(path)
    known: dict[str, Any] = report.read()
    for key, value in machine().items():
        report.put("machine", key, value)
    sections(partial(report.put, name), known, checkpoint)[name]()


def main() -> None:
    """See above."""
    path, name, seconds, *rest = sys.argv[1:]
    faulthandler.dump_traceback_later(float(seconds), exit=True)  # a thread in C: needs no Python that still runs
    measure(Path(path), name, Path(rest[0]) if rest else None)


if __name__ == "__main__":
    main()
