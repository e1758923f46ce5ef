"""Thousands of clients that connect and leave: nothing of them stays behind."""

import asyncio
import json
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.e2e.conftest import ServerProcess
from tests.waiting import wait_for

ROUNDS = 32
CYCLES = 200  # a round
TOGETHER = 20
MAX_TOKENS = 400
LEFT_S = 10  # sooner than their requests would end by themselves
WARM_UP = 8  # rounds, before two halves of twelve that are compared; in each all garbage is collected
# By how much the least of one half may exceed the other's: .2 KiB and 4 small objects for each client in between.
# A third to a half of that lies about after a round, as garbage that is not collected yet.
GROWTH = {"trm_malloc_in_use_bytes": 2**19, "trm_python_blocks": 10_000}
MESSAGES = [{"role": "user", "content": "Tom has 12 apples. He buys 7 more. How many apples does he have now?"}]
LONG = {"messages": MESSAGES, "max_tokens": MAX_TOKENS, "ignore_eos": True, "supervision_steps": 1}
SOLVE = {"question": "Ann has 9 eggs and eats 4. How many are left?", "n": 2, "max_tokens": MAX_TOKENS}


class Visit:
    """One connection. Closing it is all the goodbye that the server gets."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, path: str, body: object, share: float = 1) -> None:
        """A POST, or the first share of its bytes."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
        self.writer.write(whole[: round(len(whole) * share)])
        await self.writer.drain()

    async def events(self, count: int) -> None:
        for _ in range(count):
            await self.reader.readuntil(b"data: ")


async def silent(visit: Visit) -> None:
    """Before a single byte."""


async def in_the_head(visit: Visit) -> None:
    await visit.send("/v1/chat/completions", LONG, share=0.1)


async def in_the_body(visit: Visit) -> None:
    await visit.send("/v1/chat/completions", LONG, share=0.9)


async def waiting_for_a_reply(visit: Visit) -> None:
    await visit.send("/v1/chat/completions", LONG)
    await asyncio.sleep(0.02)


async def waiting_for_a_vote(visit: Visit) -> None:
    await visit.send("/solve", SOLVE)
    await asyncio.sleep(0.02)


async def at_once(visit: Visit) -> None:
    """The whole request, and gone: the server may not even have read it."""
    await visit.send("/v1/chat/completions", LONG)


async def before_the_first_token(visit: Visit) -> None:
    await visit.send("/v1/chat/completions", LONG | {"stream": True})
    await visit.reader.readuntil(b"\r\n\r\n")


async def in_mid_stream(visit: Visit) -> None:
    await visit.send("/v1/chat/completions", LONG | {"stream": True, "n": 2})
    await visit.events(4)


WAYS = (
    silent,
    in_the_head,
    in_the_body,
    at_once,
    waiting_for_a_reply,
    waiting_for_a_vote,
    before_the_first_token,
    in_mid_stream,
)


async def come_and_go(host: str, port: int, number: int) -> None:
    """One cycle; every other client of a way is cut off (a reset) instead of closing in good order."""
    visit = Visit(*await asyncio.open_connection(host, port))
    try:
        await WAYS[number % len(WAYS)](visit)
    finally:
        if number // len(WAYS) % 2:
            visit.writer.transport.abort()
        visit.writer.close()


async def one_round(host: str, port: int) -> None:
    gate = asyncio.Semaphore(TOGETHER)

    async def guarded(number: int) -> None:
        async with gate:
            await come_and_go(host, port, number)

    async with asyncio.timeout(120):
        await asyncio.gather(*map(guarded, range(CYCLES)))


def votes(url: str) -> object:
    return httpx.post(f"{url}/solve", json=SOLVE | {"seed": 1}, timeout=60).json()["votes"]


@pytest.fixture
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    return start_server("--max-model-len", "512", "--max-queue", "256")


def test_6400_clients_that_leave_leave_nothing_behind(server: ServerProcess) -> None:
    address = urlsplit(server.url)
    assert address.hostname is not None
    assert address.port is not None
    process = psutil.Process(server.process.pid)
    before = votes(server.url)
    files, threads = process.num_fds(), []
    memory: dict[str, list[float]] = {name: [] for name in GROWTH}

    for _ in range(ROUNDS):
        asyncio.run(one_round(address.hostname, address.port))
        wait_for(lambda: not server.metric("trm_num_requests_running"), LEFT_S)
        wait_for(lambda: not server.metric("trm_num_requests_waiting"), LEFT_S)
        wait_for(lambda: process.num_fds() <= files, LEFT_S)
        threads.append(process.num_threads())
        for name, values in memory.items():
            values.append(server.metric(name))

    assert threads[-1] <= max(threads[:WARM_UP])
    middle = (WARM_UP + ROUNDS) // 2
    for name, values in memory.items():
        assert min(values) > 0, f"{name} is not measured here"
        assert min(values[middle:]) < min(values[WARM_UP:middle]) + GROWTH[name], (name, values)
    accepted = ROUNDS * CYCLES / len(WAYS) * 5
    assert 0 < server.metric("trm_generation_tokens_total") < accepted * MAX_TOKENS / 2
    assert "Traceback" not in server.log.read_text()
    assert votes(server.url) == before
    assert server.stop() == 0
