"""POST /v1/chat/completions: n replies to a conversation, whole or streamed."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from server.choices import Wording, respond
from server.decoding import conversation, engine_requests, generation_params, num_samples
from server.logprobs import Scored, choice_logprobs
from server.schemas.chat import ChatCompletion, ChatRequest, ChoiceLogprobs
from server.serving import CallDep, ServingDep
from server.strict_json import StrictRoute

router = APIRouter(prefix="/v1", route_class=StrictRoute)


@router.post("/chat/completions", response_model=ChatCompletion)
async def chat_completions(body: ChatRequest, serving: ServingDep, call: CallDep) -> BaseModel | StreamingResponse:
    """Decode n replies to a conversation."""
    serving.check_model(body.model)
    n = num_samples(body, serving)
    params = generation_params(
        body,
        serving,
        max_tokens=body.max_tokens or body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    messages = conversation(body.messages, serving)
    requests = await engine_requests(
        serving, lambda: [serving.engine.chat.encode(messages)], params, n, param="messages"
    )
    return await respond(ChatWording(serving, params), requests, n, body, call)


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

    def tell_logprobs(self, index: int, tokens: Scored) -> ChoiceLogprobs:
        return choice_logprobs(self.serving.token_bytes, tokens)
