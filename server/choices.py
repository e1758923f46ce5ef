"""What OpenAI's two decoding routes share: replies told as the choices of one body, whole or streamed.

How its choices look each route says in a `Wording`.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, TypeVar

from fastapi.responses import Response
from pydantic import BaseModel

from server.decoding import usage_body
from server.schemas.common import Generation, StreamOptions
from server.serving import Call, Serving
from server.streaming import EventStream
from server.worker import Submission
from trm.answers import extract_boxed
from trm.engine.request import Event, FinishReason, Reply, SamplingParams, Usage

Found = TypeVar("Found")


class Wording(ABC):
    """How the choices of one request look."""

    id_prefix: ClassVar[str]
    completion: ClassVar[type[BaseModel]]
    chunk_object: ClassVar[str]

    def __init__(self, serving: Serving, params: SamplingParams) -> None:
        self.serving = serving
        self.params = params
        self._end_id = None if params.ignore_eos else serving.decoder.chat.end_id

    @abstractmethod
    def whole(self, reply: Reply) -> dict[str, Any]:
        """The text of a finished choice, and its finish_reason."""

    @abstractmethod
    def opening(self) -> dict[str, Any] | None:
        """What a streamed choice says before its first token, if anything."""

    @abstractmethod
    def piece(self, text: str) -> dict[str, Any]:
        """The next text of a streamed choice."""

    def pieces(self, index: int, event: Event) -> list[dict[str, Any]]:
        """What a streamed choice says of its next text."""
        return [self.piece(event.text)] if event.text else []

    def said(self, text: str) -> str:
        """What of a reply's text is content."""
        return text

    @abstractmethod
    def ending(self, index: int, finish_reason: FinishReason) -> list[dict[str, Any]]:
        """What a streamed choice says at its end, the last with its finish_reason."""

    @abstractmethod
    def about(self, index: int, said: Event | Reply) -> dict[str, Any]:
        """What else a choice says of its next tokens, all of them if it is told whole: what was asked for."""

    def content(self, said: Event | Reply, found: Sequence[Found]) -> list[tuple[int, Found]]:
        """The tokens, each with what was found of it. The end token is no content and is left out."""
        return [(id_, one) for id_, one in zip(said.token_ids, found, strict=True) if id_ != self._end_id]

    def told(self, index: int, event: Event) -> list[dict[str, Any]]:
        """What a stream tells of an event: of a token whose text is held back, what else is said comes at once."""
        told = self.pieces(index, event)
        if not told:
            found = event.logprobs or event.traces
            if not found or not self.content(event, found):
                return []
            told = [self.piece("")]
        told[0] |= self.about(index, event)
        return told


async def respond(wording: Wording, submission: Submission, n: int, body: Generation, call: Call) -> Response:
    """Tell the replies to the requests submitted, n for each prompt, as the body wants them."""
    serving = wording.serving
    id_ = f"{wording.id_prefix}-{call.id}"
    head: dict[str, Any] = {"id": id_, "created": int(time.time()), "model": serving.model_id}
    if body.stream:
        nothing_yet = [Usage(len(request.prompt_ids), 0, 0) for request in submission.requests]
        events = _chunks(wording, submission, head, nothing_yet, n, body.stream_options or StreamOptions())
        return EventStream(events, id_, serving.settings.keep_alive_seconds)
    replies = await submission.replies()

    def written() -> str:
        choices = [
            {
                "index": index,
                **wording.whole(reply),
                **wording.about(index, reply),
                "boxed_answer": extract_boxed(wording.said(reply.text)),
            }
            for index, reply in enumerate(replies)
        ]
        usage = usage_body([reply.usage for reply in replies], n)
        return wording.completion(**head, choices=choices, usage=usage).model_dump_json()

    said = await asyncio.to_thread(written)  # a long trace takes a second, in which others are answered
    return Response(said, media_type="application/json")


async def _chunks(
    wording: Wording,
    submission: Submission,
    head: dict[str, Any],
    usages: Sequence[Usage],
    n: int,
    options: StreamOptions,
) -> AsyncIterator[dict[str, Any]]:
    """Per choice its opening, its pieces, its end; then the usage if asked for. `usages`: before the first event."""
    usages = list(usages)
    texts = [""] * len(usages)
    opened: set[int] = set()
    head = {**head, "object": wording.chunk_object}

    def usage() -> dict[str, Any]:
        return usage_body(usages, n).model_dump()

    def chunk(index: int, said: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": None, **said}
        body = {**head, "choices": [choice]}
        if options.include_usage:
            body["usage"] = usage() if options.continuous_usage_stats else None
        return body

    async for index, event in submission:
        texts[index] += event.text
        usages[index] = event.usage or usages[index]
        if index not in opened:
            opened.add(index)
            if (opening := wording.opening()) is not None:
                yield chunk(index, opening)
        for said in wording.told(index, event):
            yield chunk(index, said)
        if event.finish_reason is not None:
            *others, last = wording.ending(index, event.finish_reason)
            for said in others:
                yield chunk(index, said)
            yield chunk(index, {**last, "boxed_answer": extract_boxed(wording.said(texts[index]))})
    if options.include_usage:
        yield {**head, "choices": [], "usage": usage()}
