"""POST /v1/responses: the reply to a conversation as a list of items, whole or streamed. Nothing is stored.

A request is chat's in other words, and decoded as that. `Output` makes items of the reply, a piece at a time, and says
what happens to them; a stream tells all of it, a whole response only what it comes to.
"""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from server.decoding import submit_chat, usage_body
from server.schemas.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputCall,
    OutputMessage,
    OutputText,
    Reasoning,
    ResponseBody,
    ResponseError,
    ResponsesRequest,
    ResponseUsage,
    TextConfig,
)
from server.serving import CallDep, ServingDep
from server.streaming import RESPONSES, STREAMED, EventStream
from server.strict_json import StrictRoute
from server.worker import Submission
from trm.answers import extract_boxed
from trm.engine.request import FinishReason, Reply, SamplingParams
from trm.tools import Arguments, Call, CallReader

router = APIRouter(prefix="/v1", route_class=StrictRoute)

NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Chat's fields that have other names here."""
Told = dict[str, Any]


@router.post("/responses", response_model=ResponseBody, responses=STREAMED)
async def responses(body: ResponsesRequest, serving: ServingDep, call: CallDep) -> BaseModel | StreamingResponse:
    """Decode one reply to a conversation."""
    serving = serving.choose(body.model)
    submission, params, _, tools = await submit_chat(body.as_chat(), serving, call, NAMES)
    response = ResponseBody(
        id=f"resp_{call.id}", created_at=int(time.time()), model=serving.model_id, **echo(body, params)
    )
    telling = Telling(response, Output(CallReader(tools) if tools else None))
    if body.stream:
        events = telling.events(submission)
        return EventStream(events, response.id, serving.settings.keep_alive_seconds, RESPONSES, telling.failed)
    (reply,) = await submission.replies()
    return telling.whole(reply)


def echo(body: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """What a response says again of its request: as it was said, or what it was taken for."""
    text, reasoning, choice = body.text or TextConfig(), body.reasoning or Reasoning(), body.tool_choice
    form = {"type": "text"} if text.format is None else text.format.model_dump(by_alias=True, exclude_unset=True)
    return {
        "instructions": body.instructions,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_output_tokens": body.max_output_tokens,
        "text": {"format": form, "verbosity": "medium"},
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "tools": [tool.model_dump(by_alias=True, exclude_unset=True) for tool in body.tools or ()],
        "tool_choice": choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "metadata": body.metadata or {},
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }


class Output:
    """The items of one reply. Each method says, as events, what it does to them. `reader`: where there may be calls."""

    def __init__(self, reader: CallReader | None) -> None:
        self.items: list[OutputMessage | OutputCall] = []
        self._reader = reader

    def tell(self, text: str, finish_reason: FinishReason | None) -> Iterator[Told]:
        """The next piece of the reply, and its end if it has one."""
        yield from self._feed(text, last=finish_reason is not None)
        if finish_reason is not None:
            yield from self._finish(cut=finish_reason == "length")

    def given_up(self) -> list[OutputMessage | OutputCall]:
        """The items of a reply that will have no end."""
        for item in self.items:
            item.status = "incomplete" if item.status == "in_progress" else item.status
        return self.items

    @property
    def said(self) -> str:
        """The text of its messages."""
        return "".join(item.content[0].text for item in self.items if isinstance(item, OutputMessage))

    def _feed(self, text: str, last: bool) -> Iterator[Told]:
        for said in self._reader.feed(text, last) if self._reader else [text] if text else []:
            match said:
                case Call(name=name):
                    yield from self._begin_call(name)
                case Arguments(text=more):
                    yield from self._argue(more)
                case str():
                    yield from self._say(said)

    def _finish(self, cut: bool) -> Iterator[Told]:
        """cut: by the limit of tokens, not by the model."""
        if not self.items:
            yield from self._say("")
        calling = isinstance(self.items[-1], OutputCall)
        yield from self._end(whole=self._reader.calling if self._reader and calling else not cut)

    def _say(self, text: str) -> Iterator[Told]:
        if not self.items or not isinstance(item := self.items[-1], OutputMessage):
            item = OutputMessage(id=f"msg_{secrets.token_hex(12)}")
            yield from self._begin(item)
            item.content.append(OutputText())
            yield self._about(item, "content_part.added", content_index=0, part=item.content[0].model_dump())
        if text:
            item.content[0].text += text
            yield self._about(item, "output_text.delta", content_index=0, delta=text, logprobs=[])

    def _begin_call(self, name: str) -> Iterator[Told]:
        ids = {"id": f"fc_{secrets.token_hex(12)}", "call_id": f"call_{secrets.token_hex(12)}"}
        yield from self._begin(OutputCall(**ids, name=name))

    def _argue(self, text: str) -> Iterator[Told]:
        item = self.items[-1]
        assert isinstance(item, OutputCall)  # arguments come behind their call
        item.arguments += text
        yield self._about(item, "function_call_arguments.delta", delta=text)

    def _begin(self, item: OutputMessage | OutputCall) -> Iterator[Told]:
        """The next item; the last one is whole."""
        if self.items:
            yield from self._end(whole=True)
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": self._place, "item": item.model_dump()}

    def _end(self, whole: bool) -> Iterator[Told]:
        item = self.items[-1]
        if isinstance(item, OutputCall):
            said = {"name": item.name, "arguments": item.arguments}
            yield self._about(item, "function_call_arguments.done", **said)
        else:
            (part,) = item.content
            yield self._about(item, "output_text.done", content_index=0, text=part.text, logprobs=[])
            yield self._about(item, "content_part.done", content_index=0, part=part.model_dump())
        item.status = "completed" if whole else "incomplete"
        yield {"type": "response.output_item.done", "output_index": self._place, "item": item.model_dump()}

    @property
    def _place(self) -> int:
        return len(self.items) - 1

    def _about(self, item: OutputMessage | OutputCall, what: str, **more: Any) -> Told:
        return {"type": f"response.{what}", "item_id": item.id, "output_index": self._place, **more}


class Telling:
    """Brings a response to its end, in events or at once."""

    def __init__(self, response: ResponseBody, output: Output) -> None:
        self.response = response
        self._output = output
        self._told = 0  # events

    def whole(self, reply: Reply) -> ResponseBody:
        """The response, of the whole reply."""
        for _ in self._output.tell(reply.text, reply.finish_reason):
            pass  # nobody listens
        return self._ended(reply)

    async def events(self, submission: Submission) -> AsyncIterator[Told]:
        """The response as it comes to be."""
        yield self._numbered(self._state("created"))
        yield self._numbered(self._state("in_progress"))
        async for _, event, reply in submission.progress():
            for said in self._output.tell(event.text, event.finish_reason):
                yield self._numbered(said)
            if reply is not None:
                yield self._numbered(self._state(self._ended(reply).status))

    def failed(self, body: dict[str, Any]) -> Iterator[Told]:
        """What a stream says at its end that an error is, with this body."""
        error = body["error"]
        yield self._numbered({"type": "error", **{name: error[name] for name in ("code", "message", "param")}})
        code = "invalid_prompt" if error["type"] == "invalid_request_error" else "server_error"
        self.response.status = "failed"
        self.response.error = ResponseError(code=code, message=error["message"])
        self.response.output = self._output.given_up()
        yield self._numbered(self._state("failed"))

    def _ended(self, reply: Reply) -> ResponseBody:
        response, counted, cut = self.response, usage_body([reply.usage], 1), reply.finish_reason == "length"
        response.completed_at = int(time.time())
        response.status = "incomplete" if cut else "completed"
        response.incomplete_details = IncompleteDetails() if cut else None
        response.output = self._output.items
        response.boxed_answer = extract_boxed(self._output.said)
        response.usage = ResponseUsage(
            input_tokens=counted.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=counted.prompt_tokens_details.cached_tokens),
            output_tokens=counted.completion_tokens,
            total_tokens=counted.total_tokens,
            trm=counted.trm,
        )
        return response

    def _state(self, what: str) -> Told:
        return {"type": f"response.{what}", "response": self.response.model_dump()}

    def _numbered(self, said: Told) -> Told:
        self._told += 1
        return said | {"sequence_number": self._told - 1}
