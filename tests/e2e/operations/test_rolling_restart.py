"""Servers behind nginx: one restarted after the other under load, and what nginx says by itself."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.e2e.conftest import ServerProcess
from tests.e2e.operations.proxy import Proxy, free_port
from tests.e2e.operations.traffic import Traffic
from tests.waiting import ask_and_leave, wait_for

Start = Callable[..., ServerProcess]
LONG = {
    "messages": [{"role": "user", "content": "How many?"}],
    "max_tokens": 3500,
    "ignore_eos": True,
    "supervision_steps": 1,
}


@pytest.fixture
def stand_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Proxy]]:
    with ExitStack() as stopping:

        def start(*urls: str) -> Proxy:
            proxy = Proxy(list(urls), tmp_path_factory.mktemp("nginx"))
            stopping.callback(proxy.stop)
            return proxy

        yield start


def test_nobody_notices_that_one_server_after_the_other_is_restarted(
    start_server: Start, stand_before: Callable[..., Proxy]
) -> None:
    servers = [start_server("--num-threads", "1") for _ in range(2)]
    proxy = stand_before(*(server.url for server in servers))

    with Traffic(proxy.url) as traffic:
        traffic.until_answered(20)
        for server in list(servers):
            assert server.stop() == 0
            traffic.until_answered(10)  # one alone carries it
            servers.append(start_server("--num-threads", "1", port=int(server.url.rpartition(":")[2])))
            traffic.until_answered(10)

    table = traffic.account()
    assert set(table) == {"answered: reply", "answered: stream"}, table
    assert any(line.endswith(": 503, 200") for line in proxy.requests), "one that drained sent nobody on"
    for server in servers[2:]:
        assert server.metric("trm_generation_tokens_total") > 0, "a restarted server got nothing to do"
    decoded = Counter(line["request_id"] for server in servers for line in server.requests if line["status"] == 200)
    assert {outcome.id: decoded[outcome.id] for outcome in traffic.outcomes if decoded[outcome.id] != 1} == {}


def test_a_client_that_leaves_nginx_leaves_the_server_too(
    server: ServerProcess, stand_before: Callable[..., Proxy]
) -> None:
    proxy = stand_before(server.url, server.url)
    with httpx.stream("POST", f"{proxy.url}/v1/chat/completions", json={**LONG, "stream": True}, timeout=60) as stream:
        chunks = stream.iter_raw()  # the connection lives as long as this does
        next(chunks)
        wait_for(lambda: server.metric("trm_num_requests_running") == 1)
    wait_for(lambda: server.metric("trm_num_requests_running") == 0)
    body = {**LONG, "supervision_steps": 16}
    ask_and_leave(f"{proxy.url}/v1/chat/completions", body, lambda: server.metric("trm_num_requests_running") == 1)
    wait_for(lambda: server.metric("trm_num_requests_running") == 0)


def test_what_nginx_itself_refuses_has_the_shape_of_our_errors(
    server: ServerProcess, stand_before: Callable[..., Proxy]
) -> None:
    proxy = stand_before(server.url, server.url)

    response = httpx.post(f"{proxy.url}/solve", content=b"x" * (2**20 + 1))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert httpx.get(f"{proxy.url}/metrics").status_code == 404
    given = httpx.get(f"{proxy.url}/version?secret=sesame", headers={"X-Request-Id": "mine"})
    made = httpx.get(f"{proxy.url}/version")
    assert given.headers["x-request-id"] == "mine"
    assert len(made.headers["x-request-id"]) == 32
    wait_for(lambda: any(made.headers["x-request-id"] in line for line in proxy.requests))  # written after the response
    assert "sesame" not in "".join(proxy.requests)


class Busy(BaseHTTPRequestHandler):
    """A server whose queue is full."""

    def do_POST(self) -> None:
        content = b'{"error": {"code": "queue_full"}}'
        self.send_response(429)
        self.send_header("Retry-After", "7")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_who_finds_a_full_server_gets_the_other_one_and_its_refusal_only_if_both_are(
    server: ServerProcess, stand_before: Callable[..., Proxy]
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as busy:
        threading.Thread(target=busy.serve_forever).start()
        full = f"http://127.0.0.1:{busy.server_port}"
        one, both = stand_before(full, server.url), stand_before(full, full)
        answers = [httpx.post(f"{one.url}/solve", json={"question": "1+1?", "max_tokens": 2}) for _ in range(4)]
        refused = httpx.post(f"{both.url}/solve", json={"question": "1+1?"})
        busy.shutdown()

    assert {answer.status_code for answer in answers} == {200}
    wait_for(lambda: any(line.endswith(": 429, 200") for line in one.requests))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
    assert refused.json()["error"]["code"] == "queue_full"


def test_without_any_server_nginx_says_so(stand_before: Callable[..., Proxy]) -> None:
    proxy = stand_before(*(f"http://127.0.0.1:{free_port()}" for _ in range(2)))

    response = httpx.post(f"{proxy.url}/solve", json={"question": "1+1?"})

    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert response.headers["retry-after"] == "1"
