"""Clients that stream chat completions from a server, in a process of their own: a job on stdin, a report on stdout.

Needs nothing but the standard library, and while the clock runs does nothing but note when which bytes came: what
is measured is the server. Each stream keeps its connection and takes the next body when a reply has ended.
"""

import asyncio
import json
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

Piece = tuple[float, bytes]  # when it came, and what
LAST_CHUNK = b"0\r\n\r\n"


class Stream(asyncio.Protocol):
    """One connection: requests one after the other, as `todo` has them, until `ended`."""

    def __init__(self, todo: Iterator[tuple[int, bytes]], seen: dict[int, list[Piece]]) -> None:
        self.todo, self.seen = todo, seen
        self.pieces: list[Piece] = []  # of the request at hand: the first is its own, and empty
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "the connection is a stream"
        self.transport = transport
        self.post()

    def post(self) -> None:
        for index, request in self.todo:
            self.pieces = self.seen[index] = [(time.perf_counter(), b"")]
            self.transport.write(request)
            return
        self.ended.set_result(None)
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if len(self.pieces) == 1 and not data.startswith(b"HTTP/1.1 200 "):
            self.ended.set_exception(ConnectionError(f"the server said {data[:500]!r}"))
            self.transport.abort()
            return
        self.pieces.append((time.perf_counter(), data))
        if data.endswith(LAST_CHUNK):
            self.post()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(f"the server closed the connection: {error or 'no reason given'}"))


def post(host: str, port: int, path: str, body: Any) -> bytes:
    """The bytes of one request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def reply(pieces: list[Piece]) -> dict[str, Any]:
    """What a stream said, and the seconds from its request to the first text and from each text to the next."""
    ends = list(accumulate(len(data) for _, data in pieces))
    raw = b"".join(data for _, data in pieces)
    texts, times, tokens = [], [], 0
    for event in re.finditer(rb"data: (\{.*?\})\n\n", raw):
        chunk = json.loads(event[1])
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
        for text in (choice["delta"].get("content") for choice in chunk["choices"]):
            if text:
                texts.append(text)
                times.append(pieces[bisect_left(ends, event.end())][0])
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return {"text": "".join(texts), "tokens": tokens, "first_s": times[0] - pieces[0][0], "gaps_s": gaps}


async def run(host: str, port: int, path: str, streams: int, bodies: list[Any]) -> dict[str, Any]:
    """Send all bodies over so many streams. cpu_s is what this process took for it."""
    todo = enumerate([post(host, port, path, body) for body in bodies])
    seen: dict[int, list[Piece]] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    loop = asyncio.get_running_loop()
    connecting = (loop.create_connection(lambda: Stream(todo, seen), host, port) for _ in range(streams))
    await asyncio.gather(*[stream.ended for _, stream in await asyncio.gather(*connecting)])
    report = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return {**report, "replies": [reply(seen[index]) for index in range(len(bodies))]}


if __name__ == "__main__":
    json.dump(asyncio.run(run(**json.load(sys.stdin))), sys.stdout)
