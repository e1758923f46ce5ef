"""POST /v1/messages and /v1/messages/count_tokens: chat, as Anthropic's clients ask for it and read it."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from server.decoding import conversation, submit_chat
from server.schemas.anthropic import (
    AssistantReply,
    CountTokensRequest,
    MessagesRequest,
    MessageUsage,
    SaidText,
    SaidToolUse,
    StopReason,
    TokenCount,
)
from server.schemas.tools import chosen_tools
from server.serving import CallDep, ServingDep
from server.streaming import ANTHROPIC, STREAMED, EventStream
from server.strict_json import StrictRoute
from server.worker import Submission
from trm.engine.request import Event, Reply, Usage
from trm.tools import Arguments, Call, Called, CallReader, read_reply

router = APIRouter(prefix="/v1/messages", route_class=StrictRoute)

NAMES = {
    "response_format": "output_config.format",
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
}
"""Chat's fields that have other names here."""


@router.post("", response_model=AssistantReply, responses=STREAMED)
async def messages(body: MessagesRequest, serving: ServingDep, call: CallDep) -> AssistantReply | StreamingResponse:
    """Decode the next message of a conversation."""
    serving = serving.choose(body.model)
    submission, _, _, tools = await submit_chat(body.as_chat(), serving, call, NAMES)
    start = AssistantReply(
        id=f"msg_{call.id}",
        model=serving.model_id,
        content=[],
        stop_reason=None,
        stop_sequence=None,
        usage=_usage(Usage(submission.prompt_tokens, 0, 0)),
    )
    room = submission.requests[0].params.max_tokens
    if body.stream:
        events = _events(start, submission, CallReader(tools) if tools else None, room < body.max_tokens)
        return EventStream(events, start.id, serving.settings.keep_alive_seconds, ANTHROPIC)
    [reply] = await submission.replies()
    said, calls, calling = read_reply(reply.text, tools)
    content: list[SaidText | SaidToolUse] = [SaidText(text=said)] if said else []
    return start.model_copy(
        update={
            "content": [*content, *map(_tool_use, calls)],
            "stop_reason": _stop_reason(reply, calling, room < body.max_tokens),
            "stop_sequence": reply.stop,
            "usage": _usage(reply.usage),
        }
    )


@router.post("/count_tokens")
async def count_tokens(body: CountTokensRequest, serving: ServingDep) -> TokenCount:
    """How many tokens the prompt has."""
    serving = serving.choose(body.model)
    chat = body.as_chat()
    turns = conversation(chat.messages, serving, chat.work)
    tools = chosen_tools(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
    described, limit = tools.described() if tools else (), serving.engine.max_model_len
    ids = await asyncio.to_thread(serving.decoder.chat.encode, turns, at_most=limit, tools=described)
    return TokenCount(input_tokens=len(ids))


async def _events(
    start: AssistantReply, submission: Submission, reader: CallReader | None, clipped: bool
) -> AsyncIterator[dict[str, Any]]:
    """The message that starts, its blocks one after the other, and how it stopped. `reader`: where there are tools."""
    blocks = _Blocks()
    started = False
    async for _, event in submission:
        usage = _usage(event.usage or Usage(submission.prompt_tokens, 0, 0))
        if not started:
            started = True
            yield {"type": "message_start", "message": start.model_copy(update={"usage": usage}).model_dump()}
        ended = event.finish_reason is not None
        for piece in reader.feed(event.text, ended) if reader else filter(None, [event.text]):
            for told in blocks.tell(piece):
                yield told
        if event.finish_reason is not None:
            for told in blocks.stop():
                yield told
            reason = _stop_reason(event, bool(reader and reader.calling), clipped)
            delta = {"stop_reason": reason, "stop_sequence": event.stop}
            yield {"type": "message_delta", "delta": delta, "usage": usage.model_dump()}
            yield {"type": "message_stop"}


class _Blocks:
    """The events of a message's blocks."""

    def __init__(self) -> None:
        self._index = -1
        self._open: type | None = None  # what the open block is made of

    def tell(self, piece: str | Call | Arguments) -> Iterable[dict[str, Any]]:
        """What the next piece of the reply brings."""
        match piece:
            case Call(name=name):
                yield from self._start(Arguments, SaidToolUse(id=_call_id(), name=name, input={}))
            case Arguments(text=text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})
            case str():
                if self._open is not str:
                    yield from self._start(str, SaidText(text=""))
                yield self._delta({"type": "text_delta", "text": piece})

    def _start(self, made_of: type, block: SaidText | SaidToolUse) -> Iterable[dict[str, Any]]:
        yield from self.stop()
        self._index, self._open = self._index + 1, made_of
        yield {"type": "content_block_start", "index": self._index, "content_block": block.model_dump()}

    def stop(self) -> Iterable[dict[str, Any]]:
        """The end of the open block."""
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
            self._open = None

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _stop_reason(ended: Event | Reply, calling: bool, clipped: bool) -> StopReason:
    """calling: whether the reply ends with a whole call. clipped: whether max_tokens was more than there was room."""
    if ended.finish_reason == "length":
        return "model_context_window_exceeded" if clipped else "max_tokens"
    if ended.stop is not None:
        return "stop_sequence"
    return "tool_use" if calling else "end_turn"


def _usage(usage: Usage) -> MessageUsage:
    return MessageUsage(
        input_tokens=usage.prompt_tokens - usage.cached_tokens,
        cache_read_input_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
    )


def _tool_use(call: Called) -> SaidToolUse:
    return SaidToolUse(id=_call_id(), name=call.name, input=call.read())


def _call_id() -> str:
    return f"toolu_{secrets.token_hex(12)}"
