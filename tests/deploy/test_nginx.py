"""deploy/nginx/trm.conf: nginx takes it, and its numbers are those of trm-serve. What it does: tests/e2e/operations."""

import re
import subprocess
from pathlib import Path

import pytest

from server.settings import ServeSettings
from tests.e2e.operations.proxy import CONF, write_conf

DEFAULTS = ServeSettings()


def test_nginx_takes_it(tmp_path: Path) -> None:
    command = write_conf(tmp_path, ["http://127.0.0.1:8001", "http://127.0.0.1:8002"], port=8000)

    done = subprocess.run([*command, "-t"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr


def seconds(directive: str) -> int:
    """The largest, where it is given more than once."""
    return max(int(value) for value in re.findall(rf"\b{directive} (\d+)s;", CONF.read_text()))


def size(directive: str) -> int:
    found = re.search(rf"\b{directive} (\d+)(m?);", CONF.read_text())
    assert found, directive
    return int(found[1]) * (2**20 if found[2] else 1)


def test_bodies_that_one_of_them_takes_the_other_takes_too() -> None:
    assert size("client_max_body_size") == DEFAULTS.max_body_bytes
    assert size("client_body_buffer_size") >= DEFAULTS.max_body_bytes, "it would write prompts to a disk"


@pytest.mark.parametrize("directive", ["client_body_timeout", "proxy_send_timeout"])
def test_bodies_have_as_long_as_at_the_server(directive: str) -> None:
    assert seconds(directive) == DEFAULTS.body_timeout_seconds


def test_nginx_waits_longer_for_a_reply_than_the_server_lets_one_take() -> None:
    assert seconds("proxy_read_timeout") > DEFAULTS.request_timeout_seconds


def test_idle_connections_are_closed_by_nginx_first() -> None:
    upstream = CONF.read_text().partition("upstream trm {")[2].partition("}")[0]
    found = re.search(r"keepalive_timeout (\d+)s;", upstream)
    assert found
    assert int(found[1]) < DEFAULTS.idle_connection_seconds
