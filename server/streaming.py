"""Server-sent events, as OpenAI's clients read them."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from server.errors import describe, internal_error_body
from trm.errors import TRMError

logger = logging.getLogger(__name__)

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must pass each token on
DONE = "data: [DONE]\n\n"


def sse(content: dict[str, Any]) -> str:
    """One server-sent event, in ASCII: some clients take U+2028 and its like for line ends."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def event_stream(events: AsyncIterator[dict[str, Any]], name: str) -> StreamingResponse:
    """A response of `events` and [DONE]. It has begun, so an error becomes an event too; `name` is for the log."""
    return StreamingResponse(_guarded(events, name), media_type="text/event-stream", headers=STREAM_HEADERS)


async def _guarded(events: AsyncIterator[dict[str, Any]], name: str) -> AsyncIterator[str]:
    try:
        async for content in events:
            yield sse(content)
    except TRMError as error:
        yield sse(describe(error)[1])
    except Exception:
        logger.exception("stream %s failed", name)
        yield sse(internal_error_body())
    yield DONE
