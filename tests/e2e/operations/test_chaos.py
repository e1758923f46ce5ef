"""Failures on purpose: killed, frozen, a device that errs, a full disk, a torn model; and what became of all."""

import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import COMMANDS, ServerProcess, clean_environment
from tests.e2e.operations.proxy import free_port
from tests.e2e.operations.traffic import Traffic
from tests.waiting import wait_for
from trm import bundled_model_path

Start = Callable[..., ServerProcess]
STOPPED_S = 6
ANSWERED = {"answered: reply", "answered: stream"}
CUT = {"told: ConnectError", "told: ReadError", "told: RemoteProtocolError", "told: WriteError"}  # by the connection


def port(server: ServerProcess) -> int:
    return int(server.url.rpartition(":")[2])


def processed(*servers: ServerProcess) -> Counter[str]:
    """How often the logs have each request."""
    return Counter(line["request_id"] for server in servers for line in server.requests)


def check_health(url: str) -> None:
    for path in ("/health", "/ready"):
        assert httpx.get(f"{url}{path}", timeout=5).status_code == 200


# The process


def test_a_killed_server_is_started_again_and_everybody_knows(start_server: Start) -> None:
    """As deploy/systemd/trm-serve.service would, on the same port."""
    server = start_server()
    with Traffic(server.url) as traffic:
        traffic.until_answered(20)
        server.process.kill()
        assert server.process.wait() == -signal.SIGKILL
        again = start_server(port=port(server))
        traffic.until_answered(20)

    table = traffic.account()
    assert set(table) - ANSWERED <= CUT | {"told: 503 starting"}, table
    assert table["told: RemoteProtocolError"] + table["told: ReadError"] > 0, "nobody was in the middle of anything"
    assert max(processed(again).values()) == 1
    assert again.metric("trm_request_rejected_total") == table["told: 503 starting"]
    assert again.stop() == 0


def test_a_frozen_server_answers_everything_once_it_thaws(start_server: Start) -> None:
    """With the defaults nobody is told anything; with limits shorter than the frost some are, and none is lost."""
    usual = start_server("--num-threads", "1")
    tight = start_server(
        *("--num-threads", "1", "--request-timeout-seconds", "4"),
        *("--idle-connection-seconds", "4", "--keep-alive-seconds", "1"),
    )
    with Traffic(usual.url, clients=6) as patient, Traffic(tight.url, clients=6) as hasty:
        for traffic in (patient, hasty):
            traffic.until_answered(10)
        for server in (usual, tight):
            server.process.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):  # what a probe sees
            httpx.get(f"{usual.url}/health", timeout=1)
        answered = patient.count("answered"), hasty.count("answered")  # with replies that were on their way
        time.sleep(STOPPED_S - (time.monotonic() - frozen_at))
        assert (patient.count("answered"), hasty.count("answered")) == answered
        for server in (usual, tight):
            server.process.send_signal(signal.SIGCONT)
            check_health(server.url)
        for traffic in (patient, hasty):
            traffic.until_answered(20)

    assert set(patient.account()) == ANSWERED
    table = hasty.account()
    assert set(table) - ANSWERED <= {"told: 504 timeout", "told: stream timeout", "told: RemoteProtocolError"}, table
    assert table.total() - sum(table[kind] for kind in ANSWERED) <= 6, "more than were under way"
    for server, traffic in ((usual, patient), (tight, hasty)):
        told = [o.id for o in traffic.outcomes if o.kind == "answered"]
        times = processed(server)
        assert {times[one] for one in told} == {1}, "some were not decoded exactly once"
        assert server.metric("trm_num_requests_running") == server.metric("trm_num_requests_waiting") == 0
        assert server.stop() == 0


# The device

ERR = """
import pathlib, torch
from trm.engine.runner import Runner
tick, file = Runner.tick, pathlib.Path({file!r})
def err(self, *args, **kwargs):
    if file.exists():
        how = file.read_text()
        file.unlink()
        if how == "dead":
            self.device = torch.device("meta")  # which holds no numbers to add
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return tick(self, *args, **kwargs)
Runner.tick = err
"""


def order(file: Path, how: str) -> None:
    """Let the next call of the model fail."""
    aside = file.with_suffix(".partial")
    aside.write_text(how)
    aside.rename(file)


def test_calls_that_fail_end_the_requests_they_were_for_and_no_others(start_server: Start, tmp_path: Path) -> None:
    server = start_server(before=ERR.format(file=str(tmp_path / "err")))
    with Traffic(server.url) as traffic:
        for _ in range(3):
            traffic.until_answered(10)
            order(tmp_path / "err", "once")
            wait_for(lambda: not (tmp_path / "err").exists())
        traffic.until_answered(10)
        check_health(server.url)

    table = traffic.account()
    assert set(table) - ANSWERED <= {"told: 500 device_error", "told: stream device_error"}, table
    failed = table["told: 500 device_error"] + table["told: stream device_error"]
    assert 3 <= failed <= 3 * 8, table
    assert server.metric("trm_request_rejected_total") == failed
    assert max(processed(server).values()) == 1
    assert server.stop() == 0


def test_a_device_that_dies_under_load_ends_the_process_and_everybody_knows(
    start_server: Start, tmp_path: Path
) -> None:
    server = start_server("--exit-on-failure", before=ERR.format(file=str(tmp_path / "err")))
    with Traffic(server.url) as traffic:
        traffic.until_answered(20)
        order(tmp_path / "err", "dead")
        assert server.process.wait(timeout=30) == 1

    table = traffic.account()
    failed = {"told: 500 device_error", "told: stream device_error", "told: 503 device_failed"}
    assert set(table) - ANSWERED <= failed | CUT, table
    assert table["told: 500 device_error"] + table["told: stream device_error"] > 0, table
    assert server.log.read_text().splitlines()[-1] == "trm-serve: the engine failed; see the log above"


# The log


def test_a_disk_that_is_full_for_a_while_costs_only_log(start_server: Start) -> None:
    server = start_server()
    process = psutil.Process(server.process.pid)
    with Traffic(server.url) as traffic:
        traffic.until_answered(10)
        process.rlimit(psutil.RLIMIT_FSIZE, (server.log.stat().st_size + 10, psutil.RLIM_INFINITY))
        traffic.until_answered(10)
        size = server.log.stat().st_size
        traffic.until_answered(10)
        assert server.log.stat().st_size == size, "the disk was not full"
        process.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        traffic.until_answered(10)

    assert set(traffic.account()) == ANSWERED
    assert server.stop() == 0
    lines = server.log.read_text().splitlines()
    torn = [line for line in lines if not line.endswith("}")]
    assert len(torn) <= 1
    messages = [json.loads(line)["message"] for line in lines if line not in torn]
    lost = [message for message in messages if "could not be written" in message]
    assert len(lost) == 1
    assert int(lost[0].split()[0]) + messages.count("request") == traffic.sent


def test_a_server_that_can_log_nothing_serves_and_ends_as_usual() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    command = [str(COMMANDS / "trm-serve"), "--port", url.rpartition(":")[2], "--num-threads", "1"]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE, env=clean_environment())
    assert process.stderr
    process.stderr.close()
    try:

        def ready() -> bool:
            assert process.poll() is None
            try:
                return httpx.get(f"{url}/ready").is_success
            except httpx.TransportError:  # it listens before it has loaded what answers
                return False

        wait_for(ready)
        with Traffic(url) as traffic:
            traffic.until_answered(20)
        assert set(traffic.account()) == ANSWERED
    finally:
        process.terminate()
    assert process.wait(timeout=60) == 0


# The model


def truncate(file: Path) -> None:
    """In place, so that whoever has it mapped sees it."""
    with file.open("r+b") as content:
        content.truncate(file.stat().st_size // 2)


def poison(file: Path) -> None:
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})


HARM: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated backbone": ("backbone/model.safetensors", truncate, "truncated or not safetensors"),
    "missing weights": ("model.safetensors", Path.unlink, "missing"),
    "garbage for a configuration": ("config.json", lambda file: file.write_bytes(b"\x00\xff{"), "not readable as JSON"),
    "weights that are no numbers": ("model.safetensors", poison, "not finite"),
}


def test_a_torn_model_ends_the_new_process_in_a_line_while_the_old_one_serves_on(
    start_server: Start, tmp_path: Path
) -> None:
    """The old one serves from the very files: its backbone lies in float32 there, so that it could be used in place."""
    model, saved = tmp_path / "model", tmp_path / "saved"
    shutil.copytree(bundled_model_path(), saved)
    backbone = load_file(saved / "backbone/model.safetensors")
    save_file(
        {name: tensor.float() for name, tensor in backbone.items()},
        saved / "backbone/model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.copytree(saved, model)
    old = start_server("--model", str(model), "--num-threads", "1")

    with Traffic(old.url, clients=2, pause_s=0.5) as traffic:
        for name, (file, harm, words) in HARM.items():
            harm(model / file)
            new = start_server("--model", str(model), ready=False)
            assert new.process.wait(timeout=60) == 1, name
            *log, last = new.log.read_text().splitlines()
            assert last.startswith(f"trm-serve: {model}"), name
            assert words in last, name
            assert "Traceback" not in "".join(log), name
            check_health(old.url)
            shutil.copyfile(saved / file, model / file)  # into the same file, if there is one
        traffic.until_answered(5)

    assert set(traffic.account()) == ANSWERED
    assert old.stop() == 0
