"""POST /v1/chat/completions: n replies to a conversation, whole or streamed."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from server.decoding import engine_requests, generation_params, num_samples, response_grammar, usage_body
from server.logprobs import choice_logprobs
from server.schemas.chat import ChatChoice, ChatCompletion, ChatRequest, ChoiceLogprobs, ReplyMessage
from server.serving import CallDep, ServingDep
from server.streaming import event_stream
from server.strict_json import StrictRoute
from server.worker import Submission
from trm.answers import extract_boxed
from trm.chat import SYSTEM_PROMPT, Message
from trm.engine.request import Event, Reply, Usage
from trm.errors import BadRequest

router = APIRouter(prefix="/v1", route_class=StrictRoute)


@router.post("/chat/completions", response_model=ChatCompletion)
async def chat_completions(body: ChatRequest, serving: ServingDep, call: CallDep) -> ChatCompletion | StreamingResponse:
    """Decode n replies to a conversation."""
    serving.check_model(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise BadRequest("give either max_tokens or max_completion_tokens, not both", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    n = num_samples(body, serving)
    params = generation_params(
        body,
        serving.engine,
        max_tokens=body.max_tokens or body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    grammar = await response_grammar(body, serving)
    requests = await engine_requests(serving, [conversation(body)], params, n, "messages", grammar)
    submission = serving.submit(call, requests)

    def logprobs(said: Event | Reply) -> ChoiceLogprobs | None:
        if params.logprobs is None:
            return None
        end_id = None if params.ignore_eos else serving.engine.chat.end_id
        return choice_logprobs(serving.token_bytes, said.token_ids, said.logprobs, end_id)

    head: dict[str, Any] = {"id": f"chatcmpl-{call.id}", "created": int(time.time()), "model": serving.model_id}
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return event_stream(chat_chunks(submission, head, n, with_usage, logprobs), head["id"])
    replies = await submission.replies()
    return ChatCompletion(
        **head,
        choices=[
            ChatChoice(
                index=index,
                message=ReplyMessage(content=reply.text),
                logprobs=logprobs(reply),
                finish_reason=reply.finish_reason,
                boxed_answer=extract_boxed(reply.text),
            )
            for index, reply in enumerate(replies)
        ],
        usage=usage_body(reply.usage for reply in replies),
    )


def conversation(body: ChatRequest) -> list[Message]:
    """The messages as the model sees them: the system prompt is explicit, never a template's default."""
    messages: list[Message] = [{"role": message.role, "content": message.text} for message in body.messages]
    if messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
    return messages


async def chat_chunks(
    submission: Submission,
    head: dict[str, Any],
    n: int,
    with_usage: bool,
    logprobs: Callable[[Event], ChoiceLogprobs | None],
) -> AsyncIterator[dict[str, Any]]:
    """Per choice its role, its text, its finish; then usage if asked for.

    A token whose text is held back brings its logprobs at once.
    """
    texts: list[str] = [""] * n
    started: set[int] = set()
    usages: dict[int, Usage] = {}

    def chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        body = {**head, "object": "chat.completion.chunk", "choices": choices}
        return {**body, "usage": usage} if with_usage else body

    def choice(index: int, delta: dict[str, str], **more: Any) -> dict[str, Any]:
        return chunk([{"index": index, "delta": delta, "finish_reason": None, **more}])

    async for index, event in submission:
        if index not in started:
            started.add(index)
            yield choice(index, {"role": "assistant", "content": ""})
        texts[index] += event.text
        if (said := logprobs(event)) and said.content:
            yield choice(index, {"content": event.text}, logprobs=said.model_dump())
        elif event.text:
            yield choice(index, {"content": event.text})
        if event.finish_reason is not None:
            yield choice(index, {}, finish_reason=event.finish_reason, boxed_answer=extract_boxed(texts[index]))
        if event.usage is not None:
            usages[index] = event.usage
    if with_usage:
        yield chunk([], usage_body(usages[index] for index in range(n)).model_dump())
