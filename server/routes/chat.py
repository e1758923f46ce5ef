"""POST /v1/chat/completions: n replies to a conversation, whole or streamed."""

import secrets
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from server.choices import Wording, respond
from server.decoding import submit_chat
from server.logprobs import choice_logprobs, choice_trace
from server.reasoning import Reasoner
from server.schemas.chat import ChatCompletion, ChatRequest
from server.serving import CallDep, Serving, ServingDep
from server.streaming import STREAMED
from server.strict_json import StrictRoute
from trm.engine.request import Event, FinishReason, Reply, SamplingParams
from trm.tools import Arguments, Call, CallReader, Tools, read_reply

router = APIRouter(prefix="/v1", route_class=StrictRoute)


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat_completions(body: ChatRequest, serving: ServingDep, call: CallDep) -> Response:
    """Decode n replies to a conversation."""
    serving = serving.choose(body.model)
    submission, params, n, tools = await submit_chat(body, serving, call)
    return await respond(ChatWording(serving, params, body, n, tools), submission, n, body, call)


class ChatWording(Wording):
    """A message, and in streams the deltas of one. Where there are `tools`, calls are told apart from text."""

    id_prefix = "chatcmpl"
    completion = ChatCompletion
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, serving: Serving, params: SamplingParams, body: ChatRequest, num_choices: int, tools: Tools | None
    ) -> None:
        super().__init__(serving, params)
        self._body = body
        self._tools = tools
        self._calls = [CallReader(tools) for _ in range(num_choices)] if tools else None
        self._reasoners = [Reasoner(serving.token_bytes) for _ in range(num_choices if body.include_reasoning else 0)]

    def whole(self, reply: Reply) -> dict[str, Any]:
        said, calls, calling = read_reply(reply.text, self._tools)
        message: dict[str, Any] = {"content": said or (None if calls else "")}
        if calls:
            message["tool_calls"] = [_call(call.name, call.arguments) for call in calls]
        if self._reasoners:
            reasoner = Reasoner(self.serving.token_bytes)
            message |= _reasoning(reasoner.feed(self.content(reply, reply.traces)) + reasoner.finish())
        ended = "tool_calls" if calling and reply.finish_reason == "stop" else reply.finish_reason
        return {"message": message, "finish_reason": ended}

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def pieces(self, index: int, event: Event) -> list[dict[str, Any]]:
        if self._calls is None:
            return super().pieces(index, event)
        return [
            {"delta": _delta(said)} for said in self._calls[index].feed(event.text, event.finish_reason is not None)
        ]

    def said(self, text: str) -> str:
        return read_reply(text, self._tools)[0]

    def told(self, index: int, event: Event) -> list[dict[str, Any]]:
        if not self._reasoners:
            return super().told(index, event)
        reasoning = self._reasoners[index].feed(self.content(event, event.traces))
        shown = event if self._body.trace else replace(event, traces=())
        return [*_reasoning_deltas(reasoning), *super().told(index, shown)]

    def ending(self, index: int, finish_reason: FinishReason) -> list[dict[str, Any]]:
        held = _reasoning_deltas(self._reasoners[index].finish()) if self._reasoners else []
        calling = self._calls is not None and self._calls[index].calling
        ended = "tool_calls" if calling and finish_reason == "stop" else finish_reason
        return [*held, {"delta": {}, "finish_reason": ended}]

    def about(self, index: int, said: Event | Reply) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.params.logprobs is not None:
            found["logprobs"] = choice_logprobs(self.serving.token_bytes, self.content(said, said.logprobs))
        if self._body.trace is not None:
            found["trace"] = choice_trace(self.serving.token_bytes, self.content(said, said.traces))
        return found


def _reasoning(text: str) -> dict[str, str]:
    """Under both of its names, where there is any."""
    return {"reasoning": text, "reasoning_content": text} if text else {}


def _reasoning_deltas(text: str) -> list[dict[str, Any]]:
    return [{"delta": _reasoning(text)}] if text else []


def _delta(said: str | Call | Arguments) -> dict[str, Any]:
    match said:
        case Call(index, name):
            return {"tool_calls": [{"index": index, **_call(name, "")}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return {"content": said}


def _call(name: str, arguments: str) -> dict[str, Any]:
    """A call under an id of its own."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
