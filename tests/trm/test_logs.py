"""What commands log: one record a line, for people or for machines, from libraries too."""

import json
import logging
import os
import select
import subprocess
import sys

import pytest

from trm.logs import JsonFormatter, TextFormatter


def record(message="done", exc_info=None, **extra):
    made = logging.LogRecord("trm.x", logging.WARNING, __file__, 1, message, (), exc_info)
    vars(made).update(extra)
    return made


def test_json_has_what_a_record_carries():
    line = JsonFormatter().format(record(request_id="a", tokens=5, reasons={"stop": 1}, color_message="no"))

    content = json.loads(line)
    assert content.pop("time").endswith("+00:00")
    assert content == {
        "level": "warning",
        "logger": "trm.x",
        "message": "done",
        "request_id": "a",
        "tokens": 5,
        "reasons": {"stop": 1},
    }


def test_text_has_it_behind_the_message():
    line = TextFormatter().format(record(path="/v1", tokens=5, reasons={"stop": 1}, odd="a b", forged="x\ny=1"))

    assert line.endswith(
        ' WARNING trm.x: done path=/v1 tokens=5 reasons={"stop": 1} odd="a b" forged="x\\ny=1"'  # one line
    )


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()], ids=["json", "text"])
def test_tracebacks_are_told(formatter):
    try:
        raise ValueError("broken")
    except ValueError:
        line = formatter.format(record(exc_info=sys.exc_info()))

    assert "ValueError: broken" in line
    assert ("\n" in line) == isinstance(formatter, TextFormatter)


LOUD = """
import logging, threading, warnings
from trm.logs import configure_logging
configure_logging("INFO", FORMAT)
import huggingface_hub, transformers
transformers.logging.get_logger("transformers.models").warning("from transformers")
huggingface_hub.logging.get_logger("huggingface_hub.api").warning("from the hub")
warnings.warn("from a warning")
logging.getLogger("uvicorn.error").info("from uvicorn")
logging.getLogger("asyncio").debug("too low")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise LookupError("from the main thread")
"""


@pytest.mark.parametrize("log_format", ["auto", "json"])
def test_into_a_pipe_everything_that_anybody_logs_is_one_json_object_a_line(log_format):
    done = subprocess.run(
        [sys.executable, "-c", LOUD.replace("FORMAT", repr(log_format))], capture_output=True, text=True, timeout=120
    )

    lines = [json.loads(line) for line in done.stderr.splitlines()]
    loggers = ["transformers.models", "huggingface_hub.api", "py.warnings", "uvicorn.error", "trm.logs", "trm.logs"]
    assert [line["logger"] for line in lines] == loggers
    assert "from a warning" in lines[2]["message"]
    assert "ZeroDivisionError" in lines[4]["exception"]
    assert "LookupError" in lines[5]["exception"]
    assert done.returncode == 1


def test_text_has_each_record_once():
    done = subprocess.run([sys.executable, "-c", LOUD.replace("FORMAT", "'text'")], capture_output=True, text=True)

    for words in ("from transformers", "from the hub", "from a warning", "from uvicorn"):
        assert sum(line.endswith(words) for line in done.stderr.splitlines()) == 1


ALONE = """
import logging, resource, sys
from trm.logs import JsonFormatter, LineHandler
handler, log = LineHandler(2), logging.getLogger("test")
handler.setFormatter(JsonFormatter())
logging.basicConfig(level="INFO", handlers=[handler])
"""  # what configure_logging does, without waiting for libraries
FILLING = """
log.info("before")
resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))  # as good as a full disk
for number in range(100):
    log.info("meanwhile %d", number)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for number in range(2):
    log.info("after %d", number)
"""


@pytest.mark.parametrize("room", [0, 10], ids=["at the end of a line", "within a line"])
def test_a_full_disk_costs_the_records_of_its_time_and_nothing_else(tmp_path, room):
    """The limit lies `room` bytes behind the first record."""
    log = tmp_path / "log"
    template = {"time": "2026-01-01T12:00:00.000+00:00", "level": "info", "logger": "test", "message": "before"}
    size = len(json.dumps(template)) + 1 + room

    with log.open("w") as file:
        code = ALONE + FILLING.replace("ROOM", str(size))
        done = subprocess.run([sys.executable, "-c", code], stderr=file, timeout=120)

    assert done.returncode == 0
    before, *torn, lost, after_0, after_1 = log.read_text().splitlines()
    assert json.loads(before)["message"] == "before"
    assert [len(line) for line in torn] == [room] * bool(room)
    assert json.loads(lost)["message"] == "100 records before this one could not be written and are lost"
    assert [json.loads(line)["message"] for line in (after_0, after_1)] == ["after 0", "after 1"]


def test_a_pipe_that_nobody_reads_ends_no_command():
    code = ALONE + FILLING.replace("ROOM", "0")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    process.stderr.close()

    assert process.wait(timeout=120) == 0


STALLING = """
for number in range(100):
    log.info("meanwhile %d %s", number, 10_000 * "x")
print("all", flush=True)
sys.stdin.read()
log.info("after")
"""


def test_a_pipe_that_is_not_read_for_a_while_holds_nobody_up():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", ALONE + STALLING], **pipes)
    assert process.stdout.readline() == b"all\n"  # a megabyte was said, of which a pipe holds less
    early = os.read(process.stderr.fileno(), 2**20)
    assert not select.select([process.stderr], [], [], 0)[0]

    _, late = process.communicate(b"", timeout=120)

    *whole, torn, lost, after = (early + late).decode().splitlines()
    assert [json.loads(line)["message"].split()[1] for line in whole] == [str(number) for number in range(len(whole))]
    assert torn.startswith('{"time"')
    assert not torn.endswith("}")
    assert json.loads(lost)["message"].startswith(f"{100 - len(whole)} records before this one")
    assert json.loads(after)["message"] == "after"
