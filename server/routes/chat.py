"""POST /v1/chat/completions: n replies to a conversation, whole or streamed."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from server.choices import Wording, respond
from server.decoding import conversation, generation_params, num_samples, submit
from server.logprobs import choice_logprobs, choice_trace
from server.schemas.chat import ChatCompletion, ChatRequest
from server.serving import CallDep, ServingDep
from server.streaming import STREAMED
from server.strict_json import StrictRoute
from trm.engine.request import Event, Reply

router = APIRouter(prefix="/v1", route_class=StrictRoute)


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def chat_completions(body: ChatRequest, serving: ServingDep, call: CallDep) -> BaseModel | StreamingResponse:
    """Decode n replies to a conversation."""
    serving = serving.choose(body.model)
    n = num_samples(body, serving)
    params = generation_params(
        body,
        serving,
        max_tokens=body.max_tokens or body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        trace=body.trace,
    )
    messages = conversation(body.messages, serving, body.work)
    submission = await submit(
        serving,
        call,
        1,
        lambda limit: [serving.decoder.chat.encode(messages, at_most=limit)],
        params,
        n,
        param="messages",
        response_format=body.response_format,
    )
    return await respond(ChatWording(serving, params), submission, n, body, call)


class ChatWording(Wording):
    """A message, and in streams the deltas of one."""

    id_prefix = "chatcmpl"
    completion = ChatCompletion
    chunk_object = "chat.completion.chunk"

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"content": text}}

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def ending(self) -> dict[str, Any]:
        return {"delta": {}}

    def about(self, index: int, said: Event | Reply) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.params.logprobs is not None:
            found["logprobs"] = choice_logprobs(self.serving.token_bytes, self.content(said, said.logprobs))
        if self.params.trace is not None:
            found["trace"] = choice_trace(self.serving.token_bytes, self.content(said, said.traces))
        return found
