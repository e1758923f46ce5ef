"""OpenAI's routes under /v1: chat completions, plain and streamed, and the models."""

import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from server.decoding import engine_requests, num_samples, sampling_params, usage_body
from server.errors import describe, internal_error_body
from server.logprobs import choice_logprobs
from server.schemas import ChatChoice, ChatCompletion, ChatRequest, ChoiceLogprobs, ModelBody, ModelList, ReplyMessage
from server.serving import CallDep, Serving, ServingDep
from server.strict_json import StrictRoute
from server.worker import Submission
from trm.answers import extract_boxed
from trm.chat import SYSTEM_PROMPT, Message
from trm.engine.request import Event, Reply, Usage
from trm.errors import BadRequest, TRMError

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1", route_class=StrictRoute)

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must pass each token on
DONE = "data: [DONE]\n\n"


@router.post("/chat/completions", response_model=ChatCompletion)
async def chat_completions(body: ChatRequest, serving: ServingDep, call: CallDep) -> ChatCompletion | StreamingResponse:
    """Decode n replies to a conversation."""
    serving.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options needs stream: true", param="stream_options")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise BadRequest("give either max_tokens or max_completion_tokens, not both", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    n = num_samples(body, serving)
    params = sampling_params(
        body,
        serving.engine,
        max_tokens=body.max_tokens or body.max_completion_tokens,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stop=tuple(body.stop or ()),
        ignore_eos=body.ignore_eos,
    )
    requests = await engine_requests(serving, [conversation(body)], params, n, param="messages")
    submission = serving.submit(call, requests)

    def logprobs(said: Event | Reply) -> ChoiceLogprobs | None:
        if params.logprobs is None:
            return None
        end_id = None if params.ignore_eos else serving.engine.chat.end_id
        return choice_logprobs(serving.token_bytes, said.token_ids, said.logprobs, end_id)

    head: dict[str, Any] = {"id": f"chatcmpl-{call.id}", "created": int(time.time()), "model": serving.model_id}
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        chunks = chat_chunks(submission, head, n, with_usage, logprobs)
        return StreamingResponse(chunks, media_type="text/event-stream", headers=STREAM_HEADERS)
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
) -> AsyncIterator[str]:
    """Server-sent events: per choice its role, its text, its finish; then usage if asked for; then [DONE].

    A token whose text is held back brings its logprobs at once. The response has begun, so an error
    becomes an event too.
    """
    texts: list[str] = [""] * n
    started: set[int] = set()
    usages: dict[int, Usage] = {}

    def chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        body = {**head, "object": "chat.completion.chunk", "choices": choices}
        return sse({**body, "usage": usage} if with_usage else body)

    def choice(index: int, delta: dict[str, str], **more: Any) -> str:
        return chunk([{"index": index, "delta": delta, "finish_reason": None, **more}])

    try:
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
    except TRMError as error:
        yield sse(describe(error)[1])
    except Exception:
        logger.exception("stream %s failed", head["id"])
        yield sse(internal_error_body())
    yield DONE


def sse(content: dict[str, Any]) -> str:
    """One server-sent event, in ASCII: some clients take U+2028 and its like for line ends."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


@router.get("/models")
async def models(serving: ServingDep) -> ModelList:
    """The one model there is."""
    return ModelList(data=[_model(serving)])


@router.get("/models/{name:path}")
async def model(name: str, serving: ServingDep) -> ModelBody:
    """The model, if that is its name; ids may hold slashes."""
    serving.check_model(name)
    return _model(serving)


def _model(serving: Serving) -> ModelBody:
    return ModelBody(id=serving.model_id, created=serving.created, max_model_len=serving.engine.max_model_len)
