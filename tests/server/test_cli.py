"""`trm-serve` up to the point where it would serve: what goes wrong is one line and a status."""

import logging
import os
import platform
import shutil
import socket
import subprocess
import sys

import pytest

from server import cli
from server.settings import ServeSettings
from trm import bundled_model_path
from trm.errors import ConfigError


@pytest.fixture
def serve(monkeypatch, capfd):
    """Run the command; returns its status and what it wrote to standard error."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["trm-serve", *argv])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        error = capfd.readouterr().err
        return (code, error) if isinstance(code, int) else (1, f"{error}{code}\n")  # as the interpreter does

    return run


def test_a_taken_port_is_named_before_anything_is_loaded(serve, monkeypatch):
    monkeypatch.setattr(cli, "load_engine", lambda settings: pytest.fail("loaded a model in vain"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, error = serve("--port", str(port))

    assert status == 2
    assert f"127.0.0.1:{port}: Address already in use; " in error
    assert error.count("\n") == 1


def test_an_address_that_is_not_ours_is_named():
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid:8000"):
        cli.listen("no.such.host.invalid", 8000)


def test_all_of_a_host_may_be_listened_on():
    with cli.listen("0.0.0.0", 0) as sock:
        socket.create_connection(("127.0.0.1", sock.getsockname()[1])).close()


def test_no_packet_waits_for_the_acknowledgement_of_the_one_before():
    """Nagle's algorithm and delayed acknowledgements cost 40 ms a reply."""
    with cli.listen("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()):
        connection, _ = sock.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_model_that_is_not_there_is_named(serve, tmp_path):
    for path, words in ((tmp_path / "missing", "no such directory"), (tmp_path, "config.json: missing")):
        status, error = serve("--port", "0", "--model", str(path))

        assert status == 1
        assert str(path) in error
        assert words in error
        assert "Traceback" not in error


@pytest.mark.parametrize("name", ["model.safetensors", "backbone/model.safetensors", "config.json", "tokenizer.json"])
def test_a_corrupt_file_is_named(serve, tmp_path, name):
    shutil.copytree(bundled_model_path(), tmp_path / "model")
    broken = tmp_path / "model" / name
    broken.write_bytes(broken.read_bytes()[:100])

    status, error = serve("--port", "0", "--model", str(tmp_path / "model"))

    assert status == 1
    last = error.splitlines()[-1]
    assert last.startswith("trm-serve: ")
    assert str(broken) in last or str(broken.parent) in last
    assert "Traceback" not in error


def test_settings_that_cannot_be_are_named(serve):
    status, error = serve("--max-rows", "0")

    assert (status, error.count("\n")) == (2, 1)
    assert "--max-rows" in error


def test_sizes_reach_the_engine_and_the_log_says_what_a_position_takes(caplog):
    caplog.set_level(logging.INFO)
    sizes = {"max_rows": 2, "max_model_len": 64, "max_queue": 3, "kv_cache_bytes": 10**9, "max_draft_tokens": 5}
    sizes["prefill_chunk"] = 17

    engine = cli.load_engine(ServeSettings(device="cpu", row_buckets=[2, 1], **sizes))

    assert engine.config.row_buckets == (1, 2)
    assert {name: getattr(engine.config, name) for name in sizes} == sizes
    (line,) = [record.getMessage() for record in caplog.records if record.name == "server.cli"]
    assert f"2 rows of 64 positions, {engine.bytes_per_token} bytes a position" in line


EIGHT_THREADS_ALLOCATE = """
import ctypes, threading
from server.cli import limit_malloc_arenas

limit_malloc_arenas()
libc, all_there = ctypes.CDLL("libc.so.6"), threading.Barrier(8)

def allocate():
    libc.malloc(ctypes.c_size_t(1000))
    all_there.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no arenas")
@pytest.mark.parametrize(("asked", "heaps"), [({}, cli.MALLOC_ARENAS), ({"MALLOC_ARENA_MAX": "6"}, 6)])
def test_threads_share_heaps(asked, heaps):
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | asked

    told = subprocess.run(
        [sys.executable, "-c", EIGHT_THREADS_ALLOCATE], capture_output=True, text=True, env=environment
    )

    assert told.stdout.count("<heap nr") == heaps, told.stderr
