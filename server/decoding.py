"""From the fields of a request body to engine requests, and from replies to usage.

Shared by the routes that decode. Raises BadRequest, naming the field.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from server.errors import renamed
from server.schemas.chat import ChatRequest
from server.schemas.common import (
    ChoiceFormat,
    Decoding,
    Generation,
    JsonObjectFormat,
    JsonSchemaFormat,
    PromptTokensDetails,
    RegexFormat,
    ResponseFormat,
    TRMUsage,
    UsageBody,
)
from server.schemas.messages import SYSTEM_ROLES, ChatMessage
from server.schemas.tools import chosen_tools
from server.serving import Call, Serving
from server.worker import Submission
from trm.chat import SYSTEM_PROMPTS, Message, TooLong, Work
from trm.engine.grammar import Form, GrammarCompiler
from trm.engine.request import Grammar, SamplingParams, Usage
from trm.engine.request import Request as EngineRequest
from trm.errors import BadRequest
from trm.tools import OPENING, Tools

MAX_LIKELIEST = 250_000  # tokens that traces and logprobs of one body name: a fifth of a second to write


def sampling_params(fields: Decoding, serving: Serving, **given: Any) -> SamplingParams:
    """The parameters of sample 0: the body's shared fields, overridden by `given`; None means the default.

    A sampled reply without a seed gets a fresh one.
    """
    steps = fields.supervision_steps
    if fields.effort is not None:
        steps, most = serving.decoder.model.config.effort_steps(fields.effort), serving.decoder.max_supervision
        if steps > most:
            raise BadRequest(
                f"{fields.effort_field} {fields.effort} is {steps} supervision steps; this model takes at most {most}",
                param=fields.effort_field,
            )
    values = {
        "max_tokens": fields.max_tokens,
        "temperature": fields.temperature,
        "seed": fields.seed,
        "n_supervision": steps,
        "halt_threshold": fields.halt_threshold,
        "halt_tolerance": fields.halt_tolerance,
        **given,
    }
    params = SamplingParams(**{name: value for name, value in values.items() if value is not None})
    if params.temperature > 0 and fields.seed is None:
        params = replace(params, seed=secrets.randbelow(2**63))
    return params


def generation_params(fields: Generation, serving: Serving, **given: Any) -> SamplingParams:
    """`sampling_params` of one of OpenAI's routes."""
    stop, settings = fields.stop or (), serving.settings
    at_most(settings.max_stop, "--max-stop", len(stop), f"stop holds {len(stop)} strings", "stop")
    for string in stop:
        said = f"a stop string has {len(string)} characters"
        at_most(settings.max_stop_chars, "--max-stop-chars", len(string), said, "stop")
    return sampling_params(
        fields,
        serving,
        top_p=fields.top_p,
        top_k=fields.top_k,
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=tuple((int(token), bias) for token, bias in (fields.logit_bias or {}).items()),
        stop=tuple(stop),
        ignore_eos=fields.ignore_eos,
        **given,
    )


def bound_body(params: SamplingParams, num_replies: int, trace: int, serving: Serving) -> None:
    """Raise BadRequest where one body may have to hold more of the likeliest tokens than MAX_LIKELIEST.

    `trace` is how many of them it tells of each step.
    """
    config = serving.decoder.model.config
    steps = config.n_supervision if params.n_supervision is None else params.n_supervision
    traced, scored = trace * (steps + 1), params.logprobs or 0
    tokens = num_replies * min(params.max_tokens, serving.engine.max_model_len)
    if tokens * (traced + scored) > MAX_LIKELIEST:
        param = "trace" if traced > scored else "logprobs"
        raise BadRequest(
            f"{param}: {tokens} tokens with {traced + scored} of the likeliest each are {tokens * (traced + scored)}; "
            f"one body holds at most {MAX_LIKELIEST}; lower n or max_tokens, or stream",
            param=param,
        )


def at_most(limit: int, flag: str, found: int, said: str, param: str) -> None:
    """Raise BadRequest where `found`, which `said` tells of, is beyond the limit that `flag` sets."""
    if found > limit:
        raise BadRequest(f"{said}; this server takes at most {limit} ({flag})", param=param)


def conversation(messages: Sequence[ChatMessage], serving: Serving, work: Work | None) -> list[Message]:
    """The messages as the model sees them: the system prompt is explicit, never a template's default.

    Ours, that of `work`, stands in front where the caller brings none.
    """
    said = f"there are {len(messages)} messages"
    at_most(serving.settings.max_messages, "--max-messages", len(messages), said, "messages")
    turns: list[Message] = [message.turn() for message in messages]
    if messages[0].role not in SYSTEM_ROLES:
        turns.insert(0, {"role": "system", "content": SYSTEM_PROMPTS[work or "full"]})
    return turns


def num_samples(fields: Decoding, serving: Serving, num_prompts: int = 1, param: str = "n") -> int:
    """The body's n, checked against what the server can ever take at once. `param` is the field with the prompts."""
    n = 1 if fields.n is None else fields.n
    at_most(serving.settings.max_n, "--max-n", n, f"n is {n}", "n")
    limit = serving.engine.config.max_rows + serving.engine.config.max_queue
    said = f"{num_prompts} prompts with {n} samples each are {num_prompts * n} requests"
    at_most(limit, "--max-rows + --max-queue", num_prompts * n, said, "n" if num_prompts == 1 else param)
    return n


def reply_grammar(wanted: ResponseFormat | None, tools: Tools | None, compiler: GrammarCompiler) -> Grammar | None:
    """The grammar of a response_format and of the calls of tools, None where any text will do."""
    form = None
    match wanted:
        case JsonObjectFormat():
            form = Form.json({"type": "object"})
        case JsonSchemaFormat(json_schema=described):
            form = Form.json(described.schema_)
        case RegexFormat(regex=pattern):
            form = Form.regex(pattern)
        case ChoiceFormat(choice=options):
            form = Form.choice(options)
    return compiler.compile(form, tools) if form or tools else None


async def submit_chat(
    body: ChatRequest, serving: Serving, call: Call, names: Mapping[str, str] = MappingProxyType({})
) -> tuple[Submission, SamplingParams, int, Tools | None]:
    """The body's n requests, the parameters of the first, n, and what the replies may call.

    Every chat-like route comes through here. names: chat's fields that are called otherwise where the client asks, and
    how: so errors name them, these and those of the submission.
    """
    with renamed(names):
        submitted = await _submit_chat(body, serving, call)
    submitted[0].names = names
    return submitted


async def _submit_chat(
    body: ChatRequest, serving: Serving, call: Call
) -> tuple[Submission, SamplingParams, int, Tools | None]:
    n = num_samples(body, serving)
    params = generation_params(
        body,
        serving,
        max_tokens=body.max_tokens or body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        trace=body.trace or (1 if body.include_reasoning else None),
    )
    if not body.stream:
        bound_body(params, n, body.trace or 0, serving)
    messages = conversation(body.messages, serving, body.work)
    tools = chosen_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    if tools and body.response_format and body.response_format.type != "text":
        tools = replace(tools, instead=True)
    submission = await submit(
        serving,
        call,
        1,
        lambda limit: [serving.decoder.chat.encode(messages, at_most=limit, tools=tools.described() if tools else ())],
        params,
        n,
        param="messages",
        response_format=body.response_format,
        tools=tools,
    )
    return submission, params, n, tools


async def submit(
    serving: Serving,
    call: Call,
    count: int,
    encode: Callable[[int], Iterable[Sequence[int]]],
    params: SamplingParams,
    n: int,
    param: str,
    response_format: ResponseFormat | None = None,
    tools: Tools | None = None,
) -> Submission:
    """n requests for each of `count` prompts, its samples side by side.

    Their places are reserved before anything is tokenised: a full queue refuses at once. `encode` gives the prompts'
    ids, off the event loop, and there the grammar is compiled; it is told how many tokens a prompt may have, and may
    raise TooLong. `param` is the field that holds the text.
    """
    submission = serving.reserve(call, count * n)
    limit = serving.engine.max_model_len

    def too_long(tokens: str) -> BadRequest:
        takes = f"this server takes {limit}, at least one of them for the reply; shorten it"
        return BadRequest(f"the prompt has {tokens} tokens; {takes}", param=param, code="context_length_exceeded")

    try:
        grammar, prompts = await submission.prepare(
            asyncio.to_thread(
                lambda: (reply_grammar(response_format, tools, serving.grammars), [tuple(ids) for ids in encode(limit)])
            )
        )
    except TooLong:
        raise too_long(f"more than {limit}") from None
    requests: list[EngineRequest] = []
    decoder, calls = serving.decoder_name, OPENING if tools else None
    if tools and tools.required:
        params = replace(params, stop=())  # which are for text, and calls are none
    for prompt in prompts:
        room = limit - len(prompt)
        if room < 1:
            raise too_long(str(len(prompt)))
        fitting = replace(params, max_tokens=min(params.max_tokens, room))
        samples = [replace(fitting, sample_index=index) for index in range(n)]
        requests += [EngineRequest(prompt, one, grammar, param, decoder, calls) for one in samples]
    serving.worker.submit(submission, requests)
    return submission


def usage_body(usages: Sequence[Usage], n: int) -> UsageBody:
    """The sum over replies, the n samples of a prompt side by side; it is counted once, as the first one found it."""
    prompts = usages[::n]
    prompt = sum(usage.prompt_tokens for usage in prompts)
    completion = sum(usage.completion_tokens for usage in usages)
    steps = sum(usage.supervision_steps for usage in usages)
    return UsageBody(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(usage.cached_tokens for usage in prompts)),
        trm=TRMUsage(
            supervision_steps_mean=steps / max(completion, 1),
            draft_tokens=sum(usage.draft_tokens for usage in usages),
            accepted_tokens=sum(usage.accepted_tokens for usage in usages),
        ),
    )
