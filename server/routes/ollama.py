"""Under /api, what Ollama's clients ask for and read: the models, what is known of each, and chat."""

import time
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from server.decoding import submit_chat
from server.schemas.ollama import (
    OllamaChatRequest,
    OllamaDetails,
    OllamaModel,
    OllamaModels,
    OllamaReply,
    OllamaShown,
    OllamaShowRequest,
    OllamaVersion,
)
from server.serving import Call, CallDep, Serving, ServingDep
from server.streaming import OLLAMA, EventStream
from server.strict_json import StrictRoute
from server.worker import Submission
from trm.engine.request import Event, Reply
from trm.tools import Arguments, Called, CallReader, read_reply
from trm.tools import Call as CallBegun

router = APIRouter(prefix="/api", route_class=StrictRoute)

NAMES = {
    "response_format": "format",
    "stop": "options.stop",
    "max_tokens": "options.num_predict",
    "reasoning_effort": "think",
}
"""Chat's fields that have other names here."""

LINE = {"type": "object", "properties": {"done": {"type": "boolean"}}, "required": ["done"]}


@router.get("/version")
async def build() -> OllamaVersion:
    """The version of this package."""
    return OllamaVersion(version=version("qwen-trm"))


@router.get("/tags")
async def tags(serving: ServingDep) -> OllamaModels:
    """All models that there are, the server's own first."""
    return OllamaModels(models=[_listed(serving.choose(name)) for name in serving.models])


@router.post("/show")
async def show(body: OllamaShowRequest, serving: ServingDep) -> OllamaShown:
    """What there is to say of one model."""
    serving = serving.choose(body.model)
    model, chat = serving.decoder.model, serving.decoder.chat
    return OllamaShown(
        modified_at=_spelt(serving.decoder.loaded_at),
        details=_details(serving),
        template=chat.template,
        capabilities=["completion", "tools"] if chat.knows_tools else ["completion"],
        model_info={
            "general.architecture": "trm",
            "general.parameter_count": model.stored.parameters,
            "trm.context_length": serving.engine.max_model_len,
            "trm.embedding_length": model.config.hidden_size,
            "trm.vocab_size": model.config.vocab_size,
        },
    )


def _listed(serving: Serving) -> OllamaModel:
    stored = serving.decoder.model.stored
    return OllamaModel(
        name=serving.model_id,
        model=serving.model_id,
        modified_at=_spelt(serving.decoder.loaded_at),
        size=stored.size_bytes,
        digest=stored.digest,
        details=_details(serving),
    )


def _details(serving: Serving) -> OllamaDetails:
    kind = serving.settings.quantize or serving.engine.dtype
    return OllamaDetails(
        parameter_size=spelt_size(serving.decoder.model.stored.parameters),
        quantization_level={"float32": "F32", "bfloat16": "BF16"}.get(kind, kind.upper()),
    )


def spelt_size(count: int) -> str:
    """A number of parameters as Ollama writes it: 494.0M."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)


@router.post("/chat", response_model=OllamaReply, responses={200: {"content": {OLLAMA.media_type: {"schema": LINE}}}})
async def chat(body: OllamaChatRequest, serving: ServingDep, call: CallDep) -> OllamaReply | StreamingResponse:
    """Decode the next message of a conversation, by default line by line."""
    serving = serving.choose(body.model)
    submission, _, _, tools = await submit_chat(body.as_chat(serving.engine.max_model_len), serving, call, NAMES)
    if body.stream is not False:
        lines = _lines(serving.model_id, submission, CallReader(tools) if tools else None, call)
        return EventStream(lines, f"ollama-{call.id}", serving.settings.keep_alive_seconds, OLLAMA)
    [reply] = await submission.replies()
    said, calls, _ = read_reply(reply.text, tools)
    return _reply(serving.model_id, _message(said, calls), reply, submission, call)


async def _lines(
    model: str, submission: Submission, reader: CallReader | None, call: Call
) -> AsyncIterator[dict[str, Any]]:
    """The text as it comes, each call as soon as it is whole, then what it took. `reader`: where there are tools."""
    calls: list[Called] = []

    def line(said: str, whole: Iterable[Called] = ()) -> dict[str, Any]:
        return {"model": model, "created_at": _spelt(time.time()), "message": _message(said, whole), "done": False}

    async for _, event in submission:
        ended = event.finish_reason is not None
        for piece in reader.feed(event.text, ended) if reader else filter(None, [event.text]):
            match piece:
                case CallBegun(name=name):
                    if calls:
                        yield line("", [calls.pop()])
                    calls.append(Called(name, ""))
                case Arguments(text=text):
                    calls = [Called(calls[0].name, calls[0].arguments + text)]
                case str():
                    yield line(piece)
        if event.finish_reason is not None:
            if calls:
                yield line("", calls)
            yield _reply(model, _message(""), event, submission, call).model_dump()


def _message(said: str, calls: Iterable[Called] = ()) -> dict[str, Any]:
    made = [{"function": {"name": call.name, "arguments": call.read()}} for call in calls]
    return {"role": "assistant", "content": said, **({"tool_calls": made} if made else {})}


def _reply(
    model: str, message: dict[str, Any], ended: Event | Reply, submission: Submission, call: Call
) -> OllamaReply:
    now, usage = time.perf_counter(), ended.usage
    submitted = submission.submitted_at or now
    first = submission.first_token_at or now
    return OllamaReply(
        model=model,
        created_at=_spelt(time.time()),
        message=message,
        done_reason="length" if ended.finish_reason == "length" else "stop",
        total_duration=_ns(now - call.started_at),
        prompt_eval_count=submission.prompt_tokens,
        prompt_eval_duration=_ns(first - submitted - (submission.queue_s or 0.0)),
        eval_count=usage.completion_tokens if usage else 0,
        eval_duration=_ns(now - first),
    )


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def _spelt(unix_time: float) -> str:
    return datetime.fromtimestamp(unix_time, UTC).isoformat().replace("+00:00", "Z")
