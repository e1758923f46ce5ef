"""A real server process that starts, is full, is left, is stopped, and breaks."""

import asyncio
import json
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ServerProcess
from tests.waiting import ask_and_leave, wait_for

pytestmark = pytest.mark.slow

Start = Callable[..., ServerProcess]
PROBE_S, REFUSAL_S = 0.05, 0.02  # as promised
PATIENCE = 5  # how many times as long the median may be where crowd, server and other tests share two cores
TAIL = 20  # and the slowest
LONG = {
    "messages": [{"role": "user", "content": "How many?"}],
    "max_tokens": 3500,
    "ignore_eos": True,
    "supervision_steps": 1,
}


def code(response: httpx.Response) -> Any:
    return response.json()["error"]["code"]


# Starting

WAIT_FOR_A_FILE = """
import pathlib, time
from server import cli
load_engine = cli.load_engine
def slowly(settings):
    while not pathlib.Path({file!r}).exists():
        time.sleep(0.01)
    return load_engine(settings)
cli.load_engine = slowly
"""


def test_a_server_whose_model_loads_is_alive_and_not_ready(start_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "go"
    server = start_server(before=WAIT_FOR_A_FILE.format(file=str(file)), ready=False)
    url = server.url_in(r'loading \S+; (http://[^\s"]+) answers 503')

    assert httpx.get(f"{url}/health").status_code == 200
    for response in (
        httpx.get(f"{url}/ready"),
        httpx.get(f"{url}/openapi.json"),
        httpx.post(f"{url}/v1/chat/completions", json=LONG),
    ):
        assert (response.status_code, code(response)) == (503, "starting")

    file.touch()
    assert server.url == url
    assert httpx.get(f"{url}/ready").status_code == 200
    assert server.stop() == 0


# Full


def in_turn(url: str, *work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            for part in work:
                await part(client)

    asyncio.run(run())


async def timed(request: Callable[[], Awaitable[httpx.Response]], count: int, status: int) -> list[float]:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        response = await request()
        seconds.append(time.perf_counter() - started)
        assert response.status_code == status
        await asyncio.sleep(0.005)
    return seconds


def test_a_full_server_refuses_and_answers_probes_at_once(start_server: Start) -> None:
    """32 streams, a full queue, and prompts of thousands of tokens being prepared."""
    server = start_server("--max-queue", "4")
    tokens = 0

    async def crowd(client: httpx.AsyncClient) -> None:
        async def stream() -> None:
            nonlocal tokens
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            content = json.dumps({**LONG, "stream": True}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {len(content)}\r\n"
            writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            try:
                while chunk := await reader.read(2**16):
                    tokens += chunk.count(b"data: ")
            finally:
                writer.close()

        async def tokenize() -> None:
            while True:
                await client.post("/tokenize", json={"prompt": "How many apples are there? " * 500})

        others = [asyncio.create_task(work) for work in (*(stream() for _ in range(36)), tokenize(), tokenize())]
        async with asyncio.timeout(60):
            while "trm_num_requests_waiting 4.0" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.05)
        before = tokens

        probes = await timed(lambda: client.get("/health"), 100, 200)
        refusals = await timed(lambda: client.post("/v1/chat/completions", json=LONG), 100, 429)
        refused = await client.post("/solve", json={"question": "How many?"})

        assert tokens > before + 100, "decoding went on meanwhile"
        assert int(refused.headers["retry-after"]) >= 1
        assert code(refused) == "queue_full"
        for seconds, bound in ((probes, PROBE_S), (refusals, REFUSAL_S)):
            assert statistics.median(seconds) < PATIENCE * bound
            assert statistics.quantiles(seconds, n=20)[-1] < TAIL * bound
        for other in others:
            other.cancel()
        await asyncio.wait(others)

    in_turn(server.url, crowd)
    wait_for(lambda: server.metric("trm_num_requests_running") == 0)
    assert server.metric("trm_num_requests_waiting") == 0
    assert server.metric("trm_client_disconnects_total") >= 36
    assert server.metric("trm_request_rejected_total") == 101
    assert server.stop() == 0


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [1] * 500_000},
        {"messages": [{"role": "user", "content": "a"}] * 30_000},
        {"messages": [], **{f"{number:x}": 1 for number in range(100_000)}},
        {"messages": [{"role": "user", "content": "a"}], "logit_bias": {str(number): 1 for number in range(90_000)}},
    ],
    ids=["no messages", "messages", "unknown fields", "biases"],
)
def test_a_body_that_is_a_megabyte_of_trouble_holds_nobody_up(server: ServerProcess, body: Any) -> None:
    content = json.dumps(body, separators=(",", ":"))
    assert 500_000 < len(content) < 2**20

    async def crowd(client: httpx.AsyncClient) -> None:
        async def trouble() -> None:
            for _ in range(5):
                headers = {"content-type": "application/json"}
                response = await client.post("/v1/chat/completions", content=content, headers=headers)
                assert response.status_code == 400

        other = asyncio.create_task(trouble())
        seconds = []
        while not other.done():
            seconds += await timed(lambda: client.get("/health"), 1, 200)
        await other
        assert statistics.median(seconds) < PATIENCE * PROBE_S
        assert max(seconds) < TAIL * PROBE_S

    in_turn(server.url, crowd)


# Left


def test_clients_that_leave_free_their_rows_and_their_places(start_server: Start) -> None:
    server = start_server("--max-rows", "2")
    url, body = f"{server.url}/v1/chat/completions", {**LONG, "supervision_steps": 16}
    with ExitStack() as stack:
        running = [
            stack.enter_context(httpx.stream("POST", url, json={**body, "stream": True}, timeout=60)) for _ in range(2)
        ]
        streams = [response.iter_raw() for response in running]
        for stream in streams:
            next(stream)
        for streamed in (True, False):  # they wait in the queue, and leave it
            ask_and_leave(url, {**body, "stream": streamed}, lambda: server.metric("trm_num_requests_waiting") == 1)
            wait_for(lambda: server.metric("trm_num_requests_waiting") == 0)
    wait_for(lambda: server.metric("trm_num_requests_running") == 0)
    ask_and_leave(url, body, lambda: server.metric("trm_num_requests_running") == 1)  # who waits for the whole reply
    wait_for(lambda: server.metric("trm_num_requests_running") == 0)
    row_steps = server.metric("trm_row_steps_total")

    assert httpx.post(f"{server.url}/solve", json={"question": "1+1?", "max_tokens": 1}, timeout=60).status_code == 200

    assert server.metric("trm_row_steps_total") - row_steps < 32, "nobody else was decoding"
    assert server.metric("trm_client_disconnects_total") == 5
    gone = [line for line in server.requests if line["status"] == 499]
    assert len(gone) == 5
    assert server.stop() == 0


# What is left of them in the log


def test_the_log_is_json_and_holds_no_secrets(start_server: Start) -> None:
    server = start_server("--api-key", "sesame-key", "--log-level", "debug")
    headers = {"Authorization": "Bearer sesame-key", "Cookie": "sesame", "X-Request-Id": "known"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        for body in ({"question": "sesame?", "max_tokens": 2}, {"question": ["sesame", 1]}, {"sesame": 1}):
            client.post("/solve?q=sesame", json=body)
        client.post("/v1/chat/completions", json={**LONG, "max_tokens": 2, "stream": True, "stop": "sesame"})
        client.get("/v1/models", headers={"Authorization": "Bearer sesame"})
        client.post("/solve", content=b'{"sesame')
    with socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port)) as connection:
        connection.sendall(b"sesame open\r\n\r\n")
        assert b"400 Bad Request" in connection.recv(1000)
    assert server.stop() == 0

    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert "Invalid HTTP request received." in [line["message"] for line in lines]
    assert [line["status"] for line in server.requests if line["path"] == "/solve"] == [200, 400, 400, 400]
    assert {line["request_id"] for line in server.requests} == {"known"}
    assert "sesame" not in server.log.read_text()


# Stopped


def test_a_second_signal_exits_at_once(start_server: Start) -> None:
    server = start_server("--drain-seconds", "60")
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**LONG, "stream": True}) as response:
        chunks = response.iter_raw()  # the connection lives as long as this does
        next(chunks)
        server.process.terminate()
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert httpx.get(f"{server.url}/health").status_code == 200
        refused = httpx.post(f"{server.url}/solve", json={"question": "1+1?"})
        assert (refused.status_code, code(refused)) == (503, "draining")
        assert server.process.poll() is None

        server.process.terminate()

        assert server.process.wait(timeout=5) == 128 + signal.SIGTERM


def test_a_drain_that_takes_too_long_ends_what_is_left_with_an_error(start_server: Start) -> None:
    server = start_server("--drain-seconds", "0.5")
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json={**LONG, "stream": True, "supervision_steps": 16}, timeout=60
    ) as response:
        chunks = response.iter_text()
        next(chunks)
        server.process.terminate()
        text = "".join(chunks)

    *_, error, done = text.strip().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "draining"
    assert done == "data: [DONE]"
    assert server.process.wait(timeout=10) == 0


# Broken

LOSE_THE_DEVICE = """
import torch
from trm.engine.runner import Runner
def lost(self, *args, **kwargs):
    self.device = torch.device("meta")  # which holds no numbers to add
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
Runner.logits = lost
"""


def test_a_lost_device_leaves_a_process_that_says_so(start_server: Start) -> None:
    server = start_server(before=LOSE_THE_DEVICE)
    stream = httpx.post(f"{server.url}/v1/chat/completions", json={**LONG, "stream": True}, timeout=60)

    assert '"code":"device_error"' in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    for path in ("/health", "/ready"):
        response = httpx.get(f"{server.url}{path}")
        assert (response.status_code, code(response)) == (503, "device_failed")
    assert httpx.post(f"{server.url}/solve", json={"question": "1+1?"}).status_code == 503
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(timeout=0.5)
    assert server.stop() == 0


NEVER_TICKS = "import time\nfrom trm.engine.runner import Runner\nRunner.tick = lambda *args: time.sleep(1000)"


def test_a_server_whose_device_hangs_says_so_and_still_stops(start_server: Start) -> None:
    server = start_server("--max-step-seconds", "1", before=NEVER_TICKS)

    told = httpx.post(f"{server.url}/v1/chat/completions", json=LONG, timeout=30)

    assert (told.status_code, code(told)) == (503, "device_failed")
    assert httpx.get(f"{server.url}/health").status_code == 503
    server.process.terminate()
    assert server.process.wait(timeout=20) == 1  # sooner than the drain would be over
