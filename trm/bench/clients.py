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
READ_BYTES = 2**16


async def stream(host: str, port: int, todo: Iterator[tuple[int, bytes]], seen: dict[int, list[Piece]]) -> None:
    """One connection: post body after body; the first piece of each is its request's, and empty."""
    reader, writer = await asyncio.open_connection(host, port)
    for index, request in todo:
        pieces = seen[index] = [(time.perf_counter(), b"")]
        writer.write(request)
        while not pieces[-1][1].endswith(LAST_CHUNK):
            data = await reader.read(READ_BYTES)
            if not data or not (len(pieces) > 1 or data.startswith(b"HTTP/1.1 200 ")):
                raise ConnectionError(f"the server said {data[:500]!r}")
            pieces.append((time.perf_counter(), data))
    writer.close()
    await writer.wait_closed()


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
    await asyncio.gather(*(stream(host, port, todo, seen) for _ in range(streams)))
    report = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return {**report, "replies": [reply(seen[index]) for index in range(len(bodies))]}


if __name__ == "__main__":
    json.dump(asyncio.run(run(**json.load(sys.stdin))), sys.stdout)
