"""Streams, as the clients of each API read them: server-sent events, or lines of JSON."""

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.types import Message, Send

from server.errors import UNEXPECTED, Shape, anthropic_body, ollama_body, openai_body, problem_of, shape
from trm.errors import TRMError

logger = logging.getLogger(__name__)

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must pass each token on
DONE = b"data: [DONE]\n\n"
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}
"""What the OpenAPI document says of a route that can stream, besides its body."""
Failure = Callable[[dict[str, Any]], Iterable[dict[str, Any]]]  # the events that tell of an error, from its body
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, so that no proxy takes a long wait for a dead connection


def _line(content: dict[str, Any]) -> bytes:
    """JSON in ASCII: some clients take U+2028 and its like for line ends."""
    data = to_json(content)  # several times as fast as json.dumps, but it cannot escape
    if not data.isascii():
        data = json.dumps(json.loads(data), separators=(",", ":")).encode()
    return data


def sse(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: %s\n\n" % _line(content)


def named_sse(content: dict[str, Any]) -> bytes:
    """One server-sent event under the name that is its `type`."""
    return b"event: %s\n%s" % (content["type"].encode(), sse(content))


@dataclass(frozen=True)
class Framing:
    """How an API streams. frame: the bytes of an event. error: an error as one. end: what is always last.

    silence: what is sent where nothing else is for a while, if anything may be.
    """

    frame: Callable[[dict[str, Any]], bytes] = sse
    error: Shape = openai_body
    end: bytes = DONE
    silence: bytes = KEEP_ALIVE
    media_type: str = "text/event-stream"


OPENAI = Framing()
RESPONSES = Framing(named_sse, end=b"")
ANTHROPIC = Framing(named_sse, anthropic_body, b"")
OLLAMA = Framing(lambda content: _line(content) + b"\n", ollama_body, b"", b"", "application/x-ndjson")


def framing(path: str) -> Framing:
    """How what is asked on a path streams."""
    return next((one for one in (ANTHROPIC, OLLAMA) if one.error is shape(path)), OPENAI)


class EventStream(StreamingResponse):
    """A response of `events`, framed, and of a sign of life whenever nothing was sent for `keep_alive_s`.

    It has begun, so an error becomes an event too, or what `failure` makes of it; `name` is for the log.
    """

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any]],
        name: str,
        keep_alive_s: float,
        framing: Framing = OPENAI,
        failure: Failure | None = None,
    ) -> None:
        content = _guarded(events, name, framing, failure or (lambda error: [error]))
        super().__init__(content, headers=STREAM_HEADERS, media_type=framing.media_type)
        self._silence = framing.silence
        self._keep_alive_s = keep_alive_s

    async def stream_response(self, send: Send) -> None:
        """Send everything; a clock that runs beside costs less than a timeout for each event."""
        loop = asyncio.get_running_loop()
        sent_at = math.inf  # the last message; never while one is on its way, nor after the final one

        async def note(message: Message) -> None:
            nonlocal sent_at
            sent_at = math.inf
            await send(message)
            if message.get("more_body", True):
                sent_at = loop.time()

        async def keep_alive() -> None:
            while self._silence:
                pause = sent_at + self._keep_alive_s - loop.time()
                if pause <= 0:
                    await note({"type": "http.response.body", "body": self._silence, "more_body": True})
                else:
                    await asyncio.sleep(min(pause, self._keep_alive_s))

        clock = asyncio.ensure_future(keep_alive())
        try:
            await super().stream_response(note)
        finally:
            clock.cancel()


async def _guarded(
    events: AsyncIterator[dict[str, Any]], name: str, framing: Framing, failure: Failure
) -> AsyncIterator[bytes]:
    failed: dict[str, Any] | None = None
    frame = framing.frame
    try:
        async for content in events:
            yield frame(content)
    except TRMError as error:
        failed = framing.error(problem_of(error))
    except Exception:
        logger.exception("stream %s failed", name)
        failed = framing.error(UNEXPECTED)
    for content in failure(failed) if failed else ():
        yield frame(content)
    if framing.end:
        yield framing.end
