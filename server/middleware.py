"""What happens around every HTTP request, in this order: record it, check its key, read its body, answer HEAD as GET.

Plain ASGI, so that a handler can be cancelled: the moment a client leaves, whatever its
request is doing stops, streaming or not, and its rows leave the engine before the next tick.
"""

import asyncio
import logging
import re
import secrets
import time
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import (
    BodyTooLarge,
    EncodedBody,
    SlowBody,
    Unauthorized,
    anthropic_body,
    describe,
    error_response,
    internal_error_response,
    shape,
)
from server.metrics import Metrics, rejection
from server.paths import path_below
from server.serving import Call

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})  # probes carry no keys
CLOSED_PATHS = "/v1/decoders/"  # what begins so no setting opens: it changes what others are served
CLIENT_CLOSED_REQUEST = 499  # nginx's number; only ever logged
_REQUEST_ID = re.compile(r"[\w.:+/=-]{1,128}", re.ASCII)


class RootPath:
    """Tells the rest of the app of the prefix, and gives it back to paths that a proxy took it from.

    Works in place, so that whatever wraps it sees the same. The prefix alone is sent on to its slash, or the
    playground's page would ask for its files in the wrong place.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app = app
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["root_path"] = self.prefix
            if scope["path"] == self.prefix:
                query = scope.get("query_string", b"").decode("latin-1")
                await RedirectResponse(f"{self.prefix}/{'?' if query else ''}{query}")(scope, receive, send)
                return
            if not scope["path"].startswith(f"{self.prefix}/"):
                scope["path"] = self.prefix + scope["path"]
                if scope.get("raw_path"):
                    scope["raw_path"] = self.prefix.encode() + scope["raw_path"]
        await self.app(scope, receive, send)


class Record:
    """Gives each request an id and a `Call`, a 500 where nothing else answers, and one line in the log.

    `quiet`: paths that are logged at debug level only.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, quiet: Collection[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.quiet = quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        call = Call(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["call"] = call

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                headers, timings = MutableHeaders(scope=message), call.timings_ms()
                headers["X-Request-Id"] = call.id
                if shape(path_below(scope)) is anthropic_body:
                    headers["Request-Id"] = call.id  # where its clients look for it
                headers["OpenAI-Processing-Ms"] = f"{timings['total']:.0f}"
                headers.setdefault("Server-Timing", ", ".join(f"{name};dur={ms:.1f}" for name, ms in timings.items()))
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                call.answered = True

        try:
            await self.app(scope, receive, tagged)
        except Exception:
            if call.status is not None:  # too late for a response; the server closes the connection
                raise
            logger.exception("request %s failed", call.id)
            await internal_error_response(path_below(scope))(scope, receive, tagged)
        finally:
            self._finish(scope, call)

    def _finish(self, scope: Scope, call: Call) -> None:
        """Nothing goes on for a request that is over; count it and log it."""
        submission = call.submission
        status = CLIENT_CLOSED_REQUEST if call.abandoned or call.status is None else call.status
        facts: dict[str, Any] = {"request_id": call.id, "method": scope["method"], "path": path_below(scope)}
        facts["status"] = failure = status
        if submission is not None:
            submission.cancel()
            facts["prompt_tokens"] = submission.prompt_tokens
            facts["completion_tokens"] = submission.completion_tokens
            facts["finish_reasons"] = dict(submission.finish_reasons)
            if submission.error is not None:  # a stream has told of it in its last event only
                failure = describe(submission.error)[0]
        reason = rejection(failure, None if submission is None else submission.error)
        if reason is not None:
            facts["reason"] = reason
            if scope["method"] == "POST":
                self.metrics.rejected.labels(reason).inc()
        if call.abandoned:
            self.metrics.departures.inc()
        facts["ms"] = round((time.perf_counter() - call.started_at) * 1000)
        logger.log(logging.DEBUG if facts["path"] in self.quiet else logging.INFO, "request", extra=facts)


def is_public(path: str, public: Sequence[str]) -> bool:
    """Whether a path needs no key. What ends in /* stands for all that begin so."""
    if path.startswith(CLOSED_PATHS):
        return False
    prefixes = tuple(pattern.removesuffix("*") for pattern in public if pattern.endswith("/*"))
    return path in OPEN_PATHS or path in public or path.startswith(prefixes)


class RequireKey:
    """Refuses requests without one of `keys`. No keys: all pass; probes do, and so do `public` paths."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], public: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and self.keys
            and not is_public(path_below(scope), self.public)
            and not self._known(scope)
        ):
            remedy = "send 'Authorization: Bearer KEY', or 'x-api-key: KEY'"
            error = Unauthorized(f"missing or wrong API key; {remedy}", code="invalid_api_key")
            await error_response(error, path_below(scope))(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        """Whether it brings a key, as OpenAI's clients send it or as Anthropic's do."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = [token.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"")]
        matches = [secrets.compare_digest(one, key) for one in given for key in self.keys]  # all, whichever fits
        return any(matches)


class ReadBody:
    """Reads the body, `max_bytes` in `timeout_s` at most, then runs the handler for as long as the client stays."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call: Call = scope["state"]["call"]
        try:
            async with asyncio.timeout(self.timeout_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            slow = f"the body did not arrive within {self.timeout_s:g} s, this server's limit (--body-timeout-seconds)"
            await error_response(SlowBody(slow, code="body_timeout"), path_below(scope))(scope, receive, send)
        except (BodyTooLarge, EncodedBody) as error:
            await error_response(error, path_below(scope))(scope, receive, send)
        else:
            if body is None:
                call.abandoned = True
            else:
                await self._run(scope, body, receive, send, call)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None where the client left before its end."""
        headers = Headers(scope=scope)
        coding = ", ".join(headers.getlist("content-encoding"))
        if any(each.strip().lower() not in ("", "identity") for each in coding.split(",")):
            raise EncodedBody(
                f"Content-Encoding {coding[:100]}: this server reads bodies as they are; send it without",
                code="unsupported_content_encoding",
            )
        announced = headers.get("content-length", "0")
        size = int(announced) if announced.isdecimal() else 0
        chunks: list[bytes] = []
        more = True
        while more:
            if size > self.max_bytes:
                limit = f"the body has more than {self.max_bytes} bytes, this server's limit (--max-body-bytes)"
                raise BodyTooLarge(limit, code="body_too_large")
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size = max(size, sum(map(len, chunks)))
            more = message.get("more_body", False)
        return b"".join(chunks)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send, call: Call) -> None:
        pending = [body]

        async def replay() -> Message:
            if not pending:
                await asyncio.Event().wait()  # leaving is watched here, not by the handler
            return {"type": "http.request", "body": pending.pop(), "more_body": False}

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        handler = asyncio.ensure_future(self.app(scope, replay, send))
        watcher = asyncio.ensure_future(left())
        try:
            await asyncio.wait((handler, watcher), return_when=asyncio.FIRST_COMPLETED)
            call.abandoned = watcher.done() and not call.answered
        finally:
            handler.cancel()  # nothing happens to one that is done
            watcher.cancel()
            await asyncio.wait((handler, watcher))
        if not handler.cancelled():
            handler.result()


class HeadAsGet:
    """Answers HEAD wherever GET works: as GET, whose body the connection leaves out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)
