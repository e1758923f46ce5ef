"""Bytes to requests: uvicorn's protocol on httptools, with bounded heads, one Host in each, and errors in our shape.

An offer to go on in another protocol is ignored (RFC 9110, 7.8), and the request read by its own framing. A client of
HTTP/1.0, which knows no chunks, gets a reply of unknown length plainly, until the connection is closed (RFC 9112, 6.1).
"""

import json
from typing import Any, Self

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import HeadTooLarge, describe
from server.metrics import REJECTIONS, Metrics
from trm.errors import BadRequest

MAX_HEAD_BYTES = 64 * 1024  # request line and headers; httptools alone collects them for as long as they come


class _UntilClosed(int):
    """As the length that uvicorn expects of a reply: none is longer, and none shorter."""

    def __lt__(self, other: int) -> bool:
        return False

    def __sub__(self, other: int) -> Self:
        return self


class HttpProtocol(HttpToolsProtocol):
    """One connection. A head that is too large or not HTTP is refused and counted, and the connection closed."""

    def __init__(self, *, metrics: Metrics, **given: Any) -> None:
        super().__init__(**given)
        self._metrics = metrics

    def connection_made(self, transport: Any) -> None:
        """Called once, at first."""
        super().connection_made(transport)
        self._head_bytes: int | None = None  # of the head being read, as far as earlier reads brought it
        self._too_large = False

    def on_message_begin(self) -> None:
        """A head begins."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._head_bytes = None
        self._too_large = len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES
        hosts = [value for name, value in self.headers if name == b"host"]
        version = self.parser.get_http_version()
        ambiguous = len(hosts) != 1 and version == "1.1"
        if self._too_large or ambiguous or self.parser.get_method() == b"CONNECT":
            raise ValueError  # which the parser makes an error of its own
        if self.parser.should_upgrade():
            return  # the parser stops behind this head, and `data_received` feeds it again without the offer
        super().on_headers_complete()
        if version == "1.0":
            self.cycle.chunked_encoding = False
            self.cycle.expected_content_length = _UntilClosed()

    def on_message_complete(self) -> None:
        """A request is whole, or a head that offers another protocol."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            self._too_large = self._head_bytes > MAX_HEAD_BYTES
            if self._too_large:
                self.logger.warning("Request head too large.")
                self.send_400_response("")
                return
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = self._head_without_offer() + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
            except httptools.HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self.send_400_response("")
                return

    def _head_without_offer(self) -> bytes:
        """The head that the parser has stopped behind, to be read once more."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(token for token in value.split(b",") if token.strip().lower() != b"upgrade")
            if name != b"upgrade":
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, in the place of uvicorn's plain text."""
        error = BadRequest("this is not an HTTP request that the server can read; the connection is closed")
        if self._too_large:
            error = HeadTooLarge(f"request line and headers have more than {MAX_HEAD_BYTES} bytes, this server's limit")
        status, body = describe(error)
        self._metrics.rejected.labels(REJECTIONS[status]).inc()  # nothing else sees it: it comes before the application
        content = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} {'Request Header Fields Too Large' if self._too_large else 'Bad Request'}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + content)
        self.transport.close()
