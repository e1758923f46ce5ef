"""One HTTP/1.1 connection, byte for byte: what a client needs in order to misbehave, too.

Knows no routes. Raises ConnectionError where the server closes too early or says what is no HTTP.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

SMALL_BUFFER_BYTES = 4096  # of a reader who lets the server wait


@dataclass(frozen=True)
class Head:
    """Status and headers (names in lower case) of a response."""

    status: int
    headers: Mapping[str, str]


def message(url: str, method: str, path: str, content: bytes, announced: int | None = None) -> bytes:
    """The bytes of one request. `announced`: the length that it claims, if not its own."""
    length = len(content) if announced is None else announced
    lines = [f"{method} {path} HTTP/1.1", f"Host: {urlsplit(url).netloc}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode() + content


class Connection:
    """One request after the other: `send`, `head`, then `pieces` or `body` to their end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._head = Head(0, {})

    @classmethod
    async def open(cls, url: str, small_buffer: bool = False) -> Self:
        """`small_buffer`: the system takes in only a little of what is not read."""
        address = urlsplit(url)
        sock = socket.socket()
        try:
            sock.setblocking(False)
            if small_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
            await asyncio.get_running_loop().sock_connect(sock, (address.hostname, address.port))
            limit = SMALL_BUFFER_BYTES if small_buffer else 2**16
            return cls(*await asyncio.open_connection(sock=sock, limit=limit))
        except BaseException:
            sock.close()
            raise

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(self) -> Head:
        """The next response's status and headers."""
        try:
            first, *rest = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            version, _, status = first.partition(" ")
            if version != "HTTP/1.1":
                raise ConnectionError(f"the server said {first[:100]!r}")
            fields = (line.partition(":") for line in rest if line)
            self._head = Head(int(status[:3]), {name.lower(): value.strip() for name, _, value in fields})
        except asyncio.IncompleteReadError as error:
            raise ConnectionError(f"the server closed the connection before an answer: {error.partial!r}") from None
        return self._head

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body of the response at hand, chunk by chunk."""
        try:
            if self._head.headers.get("transfer-encoding") != "chunked":
                yield await self._reader.readexactly(int(self._head.headers["content-length"]))
                return
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readexactly(2)
        except asyncio.IncompleteReadError:
            raise ConnectionError("the server closed the connection in the middle of an answer") from None

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    @property
    def reusable(self) -> bool:
        """Whether the server takes another request after the response at hand."""
        return self._head.headers.get("connection", "").lower() != "close"

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):  # it had been cut off
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Cut it off: the server sees a reset instead of an end."""
        self._writer.transport.abort()


async def ask(url: str, method: str, path: str, body: Any = None) -> tuple[Head, bytes]:
    """One request on a connection of its own."""
    connection = await Connection.open(url)
    try:
        await connection.send(message(url, method, path, b"" if body is None else json.dumps(body).encode()))
        return await connection.head(), await connection.body()
    finally:
        await connection.close()
