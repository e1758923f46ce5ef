"""POST /v1/completions: n continuations of each prompt, whole or streamed."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from server.choices import Wording, respond
from server.decoding import bound_body, generation_params, num_samples, submit
from server.logprobs import Offsets, completion_logprobs
from server.schemas.completions import Completion, CompletionRequest
from server.serving import CallDep, Serving, ServingDep
from server.streaming import STREAMED
from server.strict_json import StrictRoute
from trm.engine.request import Event, FinishReason, Reply, SamplingParams

router = APIRouter(prefix="/v1", route_class=StrictRoute)


@router.post("/completions", response_model=Completion, responses=STREAMED)
async def completions(body: CompletionRequest, serving: ServingDep, call: CallDep) -> Response:
    """Continue one prompt, or a list of them, all or none. The choices of one prompt stand side by side."""
    serving = serving.choose(body.model)
    prompts, chat = body.prompts, serving.decoder.chat
    n = num_samples(body, serving, len(prompts), param="prompt")
    params = generation_params(body, serving, logprobs=body.logprobs)
    if not body.stream:
        bound_body(params, n * len(prompts), 0, serving)
    submission = await submit(
        serving,
        call,
        len(prompts),
        lambda limit: [chat.encode_prompt(prompt, limit) if isinstance(prompt, str) else prompt for prompt in prompts],
        params,
        n,
        param="prompt",
        response_format=body.response_format,
    )
    return await respond(CompletionWording(serving, params, len(submission.requests)), submission, n, body, call)


class CompletionWording(Wording):
    """A text, and in streams its pieces."""

    id_prefix = "cmpl"
    completion = Completion
    chunk_object = "text_completion"

    def __init__(self, serving: Serving, params: SamplingParams, num_choices: int) -> None:
        super().__init__(serving, params)
        self._offsets = [Offsets(serving.decoder.chat, serving.token_bytes) for _ in range(num_choices)]

    def whole(self, reply: Reply) -> dict[str, Any]:
        return {"text": reply.text, "finish_reason": reply.finish_reason}

    def opening(self) -> None:
        return None

    def piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def ending(self, index: int, finish_reason: FinishReason) -> list[dict[str, Any]]:
        return [{"text": "", "finish_reason": finish_reason}]

    def about(self, index: int, said: Event | Reply) -> dict[str, Any]:
        if self.params.logprobs is None:
            return {}
        tokens = self.content(said, said.logprobs)
        return {"logprobs": completion_logprobs(self.serving.token_bytes, self._offsets[index], tokens)}
