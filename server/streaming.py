"""Server-sent events, as OpenAI's clients read them."""

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.types import Message, Send

from server.errors import describe, internal_error_body
from trm.errors import TRMError

logger = logging.getLogger(__name__)

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must pass each token on
DONE = b"data: [DONE]\n\n"
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}
"""What the OpenAPI document says of a route that can stream, besides its body."""
Failure = Callable[[dict[str, Any]], Iterable[dict[str, Any]]]
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, so that no proxy takes a long wait for a dead connection


def sse(content: dict[str, Any], named: bool = False) -> bytes:
    """One server-sent event, in ASCII: some clients take U+2028 and its like for line ends. named: by its `type`."""
    data = to_json(content)  # several times as fast as json.dumps, but it cannot escape
    if not data.isascii():
        data = json.dumps(json.loads(data), separators=(",", ":")).encode()
    name = b"event: %s\n" % content["type"].encode() if named else b""
    return b"%sdata: %s\n\n" % (name, data)


class EventStream(StreamingResponse):
    """A response of `events` and [DONE], and of a comment whenever nothing was sent for `keep_alive_s`.

    It has begun, so an error becomes an event too, or several: what `failure` makes of its body. `name` is for the
    log. named: events have their `type` as their name, the last one says that it is, and [DONE] is not sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any]],
        name: str,
        keep_alive_s: float,
        failure: Failure = lambda body: [body],
        named: bool = False,
    ) -> None:
        super().__init__(_guarded(events, name, failure, named), headers=STREAM_HEADERS)
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
            while True:
                pause = sent_at + self._keep_alive_s - loop.time()
                if pause <= 0:
                    await note({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                else:
                    await asyncio.sleep(min(pause, self._keep_alive_s))

        clock = asyncio.ensure_future(keep_alive())
        try:
            await super().stream_response(note)
        finally:
            clock.cancel()


async def _guarded(
    events: AsyncIterator[dict[str, Any]], name: str, failure: Failure, named: bool
) -> AsyncIterator[bytes]:
    failed: dict[str, Any] | None = None
    try:
        async for content in events:
            yield sse(content, named)
    except TRMError as error:
        failed = describe(error)[1]
    except Exception:
        logger.exception("stream %s failed", name)
        failed = internal_error_body()
    for content in failure(failed) if failed else ():
        yield sse(content, named)
    if not named:
        yield DONE
