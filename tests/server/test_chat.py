"""POST /v1/chat/completions, plain and streamed."""

import asyncio
import dataclasses
import json
import time
from itertools import pairwise

import pytest

from tests.server.conftest import byte_ids, read_stream, score, scored
from trm.chat import SYSTEM_PROMPT, SYSTEM_PROMPTS, solve_messages
from trm.engine.request import Event, TokenLogprobs, Usage
from trm.errors import DeviceError, Overloaded

pytestmark = pytest.mark.anyio

URL = "/v1/chat/completions"


async def stream(client, body):
    return await read_stream(client, URL, body)


def text_of(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def test_a_reply(client, engine, chat_body):
    response = await client.post(URL, json=chat_body(), headers={"X-Request-Id": "abc"})

    assert response.status_code == 200
    body = response.json()
    assert body.pop("created") > 0
    prompt_tokens = len(engine.requests[0].prompt_ids)
    assert body == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "model": "test/model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "so \\boxed{72}"},
                "logprobs": None,
                "trace": None,
                "finish_reason": "stop",
                "boxed_answer": "72",
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 3,
            "total_tokens": prompt_tokens + 3,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "trm": {"supervision_steps_mean": 4.0, "draft_tokens": 0, "accepted_tokens": 0},
        },
    }


async def test_defaults(client, engine, chat_body):
    engine.max_model_len = 1000
    await client.post(URL, json=chat_body())

    params = engine.requests[0].params
    assert (params.temperature, params.max_tokens, params.n_supervision, params.seed) == (0, 512, None, 0)
    assert (params.top_p, params.top_k, params.min_p, params.stop, params.ignore_eos) == (1, 0, 0, (), False)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1, 0, 0)
    assert (params.logprobs, params.trace) == (None, None)
    assert (params.logit_bias, params.halt_threshold, params.halt_tolerance) == ((), None, None)


async def test_every_field_reaches_the_engine(client, engine, chat_body):
    fields = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 11}
    fields |= {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.25}
    fields |= {"halt_threshold": 0.75, "halt_tolerance": 0.01, "trace": 3}
    body = chat_body(**fields, stop=["x", "y"], ignore_eos=True, supervision_steps=2, user="me", metadata={"a": "b"})

    assert (await client.post(URL, json=body)).status_code == 200

    params = engine.requests[0].params
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.ignore_eos, params.n_supervision) == (("x", "y"), True, 2)


async def test_a_bias_is_for_token_ids(client, engine, chat_body):
    await client.post(URL, json=chat_body(logit_bias={"5": -100, "0": 1.5}))
    await client.post(URL, json=chat_body(logit_bias={}))

    assert [dict(request.params.logit_bias) for request in engine.requests] == [{5: -100, 0: 1.5}, {}]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": None}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
    ids=str,
)
async def test_logprobs_are_asked_for(client, engine, chat_body, fields, expected):
    assert (await client.post(URL, json=chat_body(**fields))).status_code == 200

    assert engine.requests[0].params.logprobs == expected


@pytest.mark.parametrize(
    ("effort", "steps"),
    [("none", 0), ("minimal", 1), ("low", 1), ("medium", 2), ("high", 4), ("xhigh", 6), ("max", 8)],
)
async def test_efforts_have_names(client, engine, chat_body, effort, steps):
    await client.post(URL, json=chat_body(reasoning_effort=effort))

    assert engine.requests[0].params.n_supervision == steps


@pytest.mark.parametrize(
    ("url", "fields", "name"),
    [
        (URL, {"reasoning_effort": "max"}, "reasoning_effort"),
        (URL, {"reasoning": {"effort": "max"}}, "reasoning.effort"),
        ("/v1/completions", {"prompt": "1", "reasoning_effort": "max"}, "reasoning_effort"),
        ("/solve", {"question": "1", "reasoning_effort": "max"}, "reasoning_effort"),
        ("/v1/responses", {"input": "1", "reasoning": {"effort": "max"}}, "reasoning.effort"),
        ("/v1/messages", {"max_tokens": 9, "output_config": {"effort": "max"}}, "output_config.effort"),
        ("/api/chat", {"think": "max"}, "think"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_effort_that_a_model_has_not_got_is_named_as_it_was_asked_for(client, engine, url, fields, name):
    engine.decoders[None] = dataclasses.replace(engine.decoders[None], max_supervision=6)
    asked = (
        {}
        if "prompt" in fields or "question" in fields or "input" in fields
        else {"messages": [{"role": "user", "content": "1"}]}
    )

    refused = await client.post(url, json={"model": "test/model", **asked, **fields})

    assert refused.status_code == 400
    assert f"{name} max is 8 supervision steps; this model takes at most 6" in refused.text
    assert not engine.requests


async def test_a_body_that_could_grow_out_of_all_measure_is_refused_and_a_stream_is_not(client, engine, chat_body):
    engine.max_model_len = 400
    fields = {"trace": 10, "supervision_steps": 16, "n": 4, "max_tokens": 1500}

    refused = await client.post(URL, json=chat_body(**fields))

    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "trace")
    said = "trace: 1600 tokens with 170 of the likeliest each are 272000; one body holds at most 250000; lower n or"
    assert refused.json()["error"]["message"].startswith(said)
    assert not engine.requests
    reasoned = fields | {"trace": None, "include_reasoning": True}
    for taken in (fields | {"n": 3}, fields | {"stream": True}, reasoned):
        assert (await client.post(URL, json=chat_body(**taken))).status_code == 200, taken
    engine.max_model_len = 20_000
    scored = {"logprobs": True, "top_logprobs": 20, "max_tokens": 20_000}
    assert (await client.post(URL, json=chat_body(**scored))).json()["error"]["param"] == "logprobs"
    several = {"prompt": ["1", "2", "3"], "max_tokens": 20_000, "logprobs": 5}
    assert (await client.post("/v1/completions", json=several)).json()["error"]["param"] == "logprobs"
    assert (await client.post("/v1/completions", json=several | {"prompt": "1"})).status_code == 200


async def test_a_long_trace_hardly_keeps_others_waiting(client, engine, chat_body):
    """While its body is written others are answered."""
    tokens, likeliest = 1000, tuple((id_, -1.0) for id_ in range(10))

    def script(request):
        usage = Usage(len(request.prompt_ids), tokens, tokens)
        yield Event((5,) * tokens, "a" * tokens, "stop", usage, traces=((likeliest,) * 17,) * tokens)

    engine.script = script
    engine.max_model_len = 2000
    beats = []

    async def beat():
        while True:
            beats.append(time.monotonic())
            await asyncio.sleep(0.001)

    heart = asyncio.create_task(beat())
    response = await client.post(URL, json=chat_body(trace=10, supervision_steps=16, max_tokens=tokens))
    heart.cancel()

    assert len(response.json()["choices"][0]["trace"]) == tokens
    assert max(later - one for one, later in pairwise(beats)) < (beats[-1] - beats[0]) / 2


@pytest.mark.parametrize(("stop", "expected"), [("a", ("a",)), (["a"], ("a",)), ([], ()), (None, ())], ids=str)
async def test_stop_is_a_string_or_a_list(client, engine, chat_body, stop, expected):
    await client.post(URL, json=chat_body(stop=stop))

    assert engine.requests[0].params.stop == expected


async def test_max_completion_tokens_is_max_tokens(client, engine, chat_body):
    await client.post(URL, json=chat_body(max_completion_tokens=9))

    assert engine.requests[0].params.max_tokens == 9


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 10_000}], ids=str)
async def test_max_tokens_is_clipped_to_the_room_left(client, engine, chat_body, fields):
    await client.post(URL, json=chat_body(**fields))

    assert engine.requests[0].positions == engine.max_model_len


async def test_a_prompt_without_room_for_a_reply_is_a_400_with_both_counts(client, engine, chat_body):
    response = await client.post(URL, json=chat_body("x" * 400))

    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "400" in error["message"]
    assert str(len(engine.chat.encode(engine.chat.conversations[0]))) in error["message"]


async def test_the_system_prompt_is_explicit(client, engine, chat_body):
    await client.post(URL, json=chat_body("hi"))

    system = {"role": "system", "content": SYSTEM_PROMPT}
    assert engine.chat.conversations == [[system, {"role": "user", "content": "hi"}]]


@pytest.mark.parametrize("role", ["system", "developer"])
async def test_a_system_prompt_of_the_callers_replaces_ours(client, engine, role):
    messages = [{"role": role, "content": "be brief"}, {"role": "user", "content": "hi"}]
    await client.post(URL, json={"messages": messages})

    assert engine.chat.conversations == [messages]


@pytest.mark.parametrize("work", SYSTEM_PROMPTS)
async def test_work_asks_as_training_does(client, engine, chat_body, work):
    body = chat_body("How many?", work=work)
    assert (await client.post(URL, json=body)).status_code == 200
    await stream(client, body)

    asked = [{"role": "system", "content": SYSTEM_PROMPTS[work]}, {"role": "user", "content": "How many?"}]
    assert engine.chat.conversations == [asked, asked]
    expected = tuple(engine.chat.encode(solve_messages("How many?", work=work)))
    assert [request.prompt_ids for request in engine.requests] == [expected, expected]


async def test_work_stands_in_front_of_a_history(client, engine):
    history = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    await client.post(URL, json={"messages": history, "work": "none"})

    assert engine.chat.conversations == [[{"role": "system", "content": SYSTEM_PROMPTS["none"]}, *history]]


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("role", ["system", "developer"])
async def test_work_and_a_system_prompt_of_the_callers_are_two(client, engine, chat_body, role, place):
    body = chat_body(work=None)
    body["messages"].insert(place, {"role": role, "content": "be brief"})
    assert (await client.post(URL, json=body)).status_code == 200

    refused = await client.post(URL, json=body | {"work": "full"})

    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "work")
    assert "system message" in error["message"]
    assert len(engine.requests) == 1


async def test_text_parts_are_lines_of_one_message(client, engine):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await client.post(URL, json={"messages": [{"role": "user", "content": parts}]})

    assert engine.chat.conversations[0][-1] == {"role": "user", "content": "one\ntwo"}


async def test_a_reply_can_be_sent_back_as_history(client, chat_body):
    body = chat_body()
    reply = (await client.post(URL, json=body)).json()["choices"][0]["message"]

    body["messages"] += [reply, {"role": "user", "content": "and?"}]

    assert (await client.post(URL, json=body)).status_code == 200


async def test_the_model_may_be_named(client, chat_body):
    assert (await client.post(URL, json=chat_body(model="test/model"))).status_code == 200


async def test_another_model_is_a_404(client, engine, chat_body):
    response = await client.post(URL, json=chat_body(model="gpt-4"))

    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'gpt-4'" in error["message"]
    assert not engine.requests


async def test_n_samples_share_prompt_and_seed(client, engine, chat_body):
    body = (await client.post(URL, json=chat_body(n=3, temperature=1))).json()

    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [request.params.sample_index for request in engine.requests] == [0, 1, 2]
    assert len({request.prompt_ids for request in engine.requests}) == 1
    assert len({request.params.seed for request in engine.requests}) == 1
    assert body["usage"]["completion_tokens"] == 9
    assert body["usage"]["prompt_tokens"] == len(engine.requests[0].prompt_ids)


async def test_sampling_without_a_seed_draws_a_fresh_one(client, engine, chat_body):
    for _ in range(2):
        await client.post(URL, json=chat_body(temperature=1))

    first, second = engine.requests
    assert first.params.seed != second.params.seed


async def test_a_seed_is_used_as_given_zero_included(client, engine, chat_body):
    await client.post(URL, json=chat_body(temperature=1, seed=0))

    assert engine.requests[0].params.seed == 0


@pytest.mark.parametrize(
    ("pieces", "boxed"),
    [(["no box"], None), ([r"\box", r"ed{ 7", "2 }"], "72"), ([r"\boxed{1} \boxed{2}"], "2"), ([r"\boxed{1"], None)],
    ids=str,
)
async def test_the_box_is_read_from_the_whole_reply(client, engine, chat_body, say, pieces, boxed):
    engine.script = say(*pieces)

    whole = (await client.post(URL, json=chat_body())).json()["choices"][0]
    streamed = [chunk["choices"][0] for chunk in await stream(client, chat_body())]

    assert whole["boxed_answer"] == boxed
    assert streamed[-1]["boxed_answer"] == boxed
    assert all("boxed_answer" not in choice for choice in streamed[:-1])


async def test_a_stream(client, chat_body):
    chunks = await stream(client, chat_body())

    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "so "}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {"content": "\\boxed{72}"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "boxed_answer": "72"}],
    ]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_stream_of_several_choices(client, engine, chat_body):
    chunks = await stream(client, chat_body(n=2))

    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["finish_reason"] for choice in own[1:]] == [None, None, "stop"]
        assert text_of(chunks, index) == "so \\boxed{72}"


async def test_a_stream_with_usage_ends_in_it(client, engine, chat_body):
    *chunks, last = await stream(client, chat_body(n=2, stream_options={"include_usage": True}))

    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    whole = (await client.post(URL, json=chat_body(n=2))).json()
    assert last["usage"] == whole["usage"]


async def test_a_stream_may_tell_the_usage_so_far_in_every_chunk(client, engine, chat_body):
    def script(request):
        for tokens in (1, 2, 3):
            final = "length" if tokens == 3 else None
            yield Event((98,), "a", final, Usage(60, tokens, 4 * tokens, cached_tokens=7, draft_tokens=tokens))

    engine.script = script
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream(client, chat_body(n=2, temperature=1, stream_options=options))

    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {60}
    assert chunks[-2]["usage"] == chunks[-1]["usage"]
    assert chunks[-1]["usage"]["trm"] == {"supervision_steps_mean": 4, "draft_tokens": 6, "accepted_tokens": 0}


async def test_text_outside_ascii_and_line_ends_survive_the_framing(client, engine, chat_body, say):
    engine.script = say("é\n\ndata: x", " 日本 \u2028 \x00 🙂\r\n")

    assert text_of(await stream(client, chat_body())) == "é\n\ndata: x 日本 \u2028 \x00 🙂\r\n"


async def test_text_that_comes_with_the_last_token_is_not_lost(client, engine, chat_body):
    engine.script = lambda request: [Event((5,), "all", "length", Usage(3, 1, 4))]

    chunks = await stream(client, chat_body())

    assert text_of(chunks) == "all"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_one_failed_choice_fails_the_request_and_cancels_the_others(client, engine, chat_body):
    def script(request):
        if request.params.sample_index == 1:
            engine.hold()  # the others get no further on their own
            yield Event((), "", "error", None, DeviceError("a logit is not finite"))
        while True:
            yield Event((1,), "a")

    engine.script = script
    response = await client.post(URL, json=chat_body(n=3, temperature=1))

    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "a logit is not finite",
        "type": "server_error",
        "param": None,
        "code": "device_error",
    }
    engine.join()
    assert engine.handles[0].cancelled
    assert engine.handles[2].cancelled


async def test_an_error_in_mid_stream_is_an_event_and_ends_it(client, engine, chat_body):
    engine.script = lambda request: [
        Event((1,), "half"),
        Event((), "", "error", Usage(1, 1, 1), DeviceError("a logit is not finite")),
    ]

    *chunks, last = await stream(client, chat_body())

    assert text_of(chunks) == "half"
    assert last["error"]["message"] == "a logit is not finite"


async def test_an_unexpected_error_in_mid_stream_leaks_nothing(client, engine, chat_body, monkeypatch, caplog):
    monkeypatch.setattr("server.choices.extract_boxed", lambda text: 1 / 0)

    *_, last = await stream(client, chat_body())

    assert last["error"]["code"] == "internal_error"
    assert "division" not in json.dumps(last)
    assert "ZeroDivisionError" in caplog.text


async def test_a_full_queue_is_a_429_that_says_when_to_return(client, engine, chat_body):
    engine.refuse = Overloaded("the queue is full")

    for fields in ({}, {"stream": True}):
        response = await client.post(URL, json=chat_body(**fields))
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"] == {
            "message": "the queue is full",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }


async def test_an_engine_that_refuses_for_its_device_is_a_503(client, engine, chat_body):
    engine.refuse = DeviceError("the engine is shut down")

    assert (await client.post(URL, json=chat_body())).status_code == 503


# What a reply took


async def test_usage_counts_one_prompt_and_all_drafts(client, engine, chat_body):
    cached = {0: 0, 1: 40, 2: 41}

    def script(request):
        index = request.params.sample_index
        yield from [Event((5,), "a")] * (3 - index)  # the first sample ends last
        yield Event((5,), "a", "length", Usage(60, 4 - index, 8, cached[index], draft_tokens=7, accepted_tokens=index))

    engine.script = script
    fields = {"n": 3, "temperature": 1, "stream_options": {"include_usage": True}}
    *_, streamed = await stream(client, chat_body(**fields))
    fields.pop("stream_options")
    usage = (await client.post(URL, json=chat_body(**fields))).json()["usage"]

    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["trm"] == {"supervision_steps_mean": 24 / 9, "draft_tokens": 21, "accepted_tokens": 3}
    assert streamed["usage"] == usage


async def test_cached_tokens_are_the_first_samples(client, engine, chat_body):
    engine.script = lambda request: [
        Event((5,), "a", "length", Usage(60, 1, 4, cached_tokens=30 + request.params.sample_index))
    ]

    usage = (await client.post(URL, json=chat_body(n=2, temperature=1))).json()["usage"]

    assert usage["prompt_tokens_details"] == {"cached_tokens": 30}


# Log probabilities


def entry(spelt, logprob, token=None):
    """What the wire says of a token."""
    return {"token": spelt.decode(errors="replace") if token is None else token, "logprob": logprob, "bytes": [*spelt]}


A_AND_ITS_RIVALS = {**entry(b"a", -0.25), "top_logprobs": [entry(b"a", 0.0), entry(b"<|im_end|>", -0.5)]}
HALF = {**entry(b"\xc3", -0.5, "\ufffd"), "top_logprobs": []}
OTHER_HALF = {
    **entry(b"\xa9", -0.75, "\ufffd"),
    "top_logprobs": [{"token": "", "logprob": 0.0, "bytes": None}],  # the model has more ids than its tokenizer
}


async def test_logprobs_of_a_reply_are_those_of_its_text(client, engine, chat_body):
    engine.script = scored

    choice = (await client.post(URL, json=chat_body(logprobs=True, top_logprobs=2))).json()["choices"][0]

    assert choice["logprobs"] == {"content": [A_AND_ITS_RIVALS, HALF, OTHER_HALF], "refusal": None}
    spelt = [byte for token in choice["logprobs"]["content"] for byte in token["bytes"]]
    assert bytes(spelt).decode() == choice["message"]["content"]


async def test_logprobs_are_streamed_with_their_tokens(client, engine, chat_body):
    engine.script = scored

    chunks = await stream(client, chat_body(logprobs=True, top_logprobs=2))

    def carrying(content, *entries):
        logprobs = {"content": list(entries), "refusal": None}
        return {"index": 0, "delta": {"content": content}, "finish_reason": None, "logprobs": logprobs}

    assert [chunk["choices"][0] for chunk in chunks] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
        carrying("a", A_AND_ITS_RIVALS),
        carrying("", HALF),
        carrying("é", OTHER_HALF),
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "boxed_answer": None},
    ]


async def test_each_choice_has_its_own_logprobs(client, engine, chat_body):
    def script(request):
        rank = request.params.sample_index
        yield Event(byte_ids(b"ab"), "ab", logprobs=(score(rank), score(rank + 1)))
        yield Event((0,), "", "stop", Usage(3, 3, 12), logprobs=(score(9),))

    engine.script = script
    body = (await client.post(URL, json=chat_body(n=2, temperature=1, logprobs=True))).json()

    found = [[token["logprob"] for token in choice["logprobs"]["content"]] for choice in body["choices"]]
    assert found == [[0.0, -0.25], [-0.25, -0.5]]


async def test_an_end_token_that_is_ignored_is_a_token_like_any_other(client, engine, chat_body):
    engine.script = lambda request: [Event((0, 98), "a", "length", Usage(3, 2, 8), logprobs=(score(0), score(1)))]

    choice = (await client.post(URL, json=chat_body(logprobs=True, ignore_eos=True))).json()["choices"][0]

    assert [token["token"] for token in choice["logprobs"]["content"]] == ["<|im_end|>", "a"]


async def test_a_reply_without_text_has_logprobs_of_nothing(client, engine, chat_body):
    engine.script = lambda request: [Event((0,), "", "stop", Usage(3, 1, 4), logprobs=(score(0),))]

    choice = (await client.post(URL, json=chat_body(logprobs=True))).json()["choices"][0]

    assert choice["logprobs"] == {"content": [], "refusal": None}


async def test_a_probability_of_zero_has_a_number(client, engine, chat_body):
    impossible = TokenLogprobs(float("-inf"), ((98, float("-inf")),))
    engine.script = lambda request: [Event((98,), "a", "length", Usage(3, 1, 4), logprobs=(impossible,))]

    choice = (await client.post(URL, json=chat_body(logprobs=True, top_logprobs=1))).json()["choices"][0]

    (token,) = choice["logprobs"]["content"]
    assert [token["logprob"], token["top_logprobs"][0]["logprob"]] == [-9999.0, -9999.0]


# Traces


def likeliest(*ids):
    """One step's candidates."""
    return tuple((id_, -0.5 * place) for place, id_ in enumerate(ids))


def traced(request):
    """What `scored` says, in two steps a token."""
    first, half, other = byte_ids("aé".encode())
    yield Event((first,), "a", traces=((likeliest(99, first), likeliest(first, 99)),))
    yield Event((half,), "", traces=((likeliest(half), likeliest(half, 9999)),))
    usage = Usage(len(request.prompt_ids), 4, 8)
    yield Event((other, 0), "é", "stop", usage, traces=((likeliest(0), likeliest(other)), (likeliest(0), likeliest(0))))


TRACED_A = {
    "token": "a",
    "bytes": [97],
    "steps": [[entry(b"b", 0.0), entry(b"a", -0.5)], [entry(b"a", 0.0), entry(b"b", -0.5)]],
}
TRACED_HALF = {
    "token": "\ufffd",
    "bytes": [0xC3],
    "steps": [
        [entry(b"\xc3", 0.0)],
        [entry(b"\xc3", 0.0), {"token": "", "logprob": -0.5, "bytes": None}],  # an id without a token
    ],
}
TRACED_OTHER_HALF = {"token": "\ufffd", "bytes": [0xA9], "steps": [[entry(b"<|im_end|>", 0.0)], [entry(b"\xa9", 0.0)]]}


async def test_a_trace_is_that_of_the_text(client, engine, chat_body):
    engine.script = traced

    choice = (await client.post(URL, json=chat_body(trace=2))).json()["choices"][0]

    assert engine.requests[0].params.trace == 2
    assert choice["trace"] == [TRACED_A, TRACED_HALF, TRACED_OTHER_HALF]
    assert bytes(byte for token in choice["trace"] for byte in token["bytes"]).decode() == choice["message"]["content"]


async def test_a_trace_is_streamed_with_its_tokens(client, engine, chat_body):
    engine.script = traced

    chunks = await stream(client, chat_body(trace=2))

    assert [chunk["choices"][0] for chunk in chunks] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
        {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None, "trace": [TRACED_A]},
        {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": None, "trace": [TRACED_HALF]},
        {"index": 0, "delta": {"content": "é"}, "logprobs": None, "finish_reason": None, "trace": [TRACED_OTHER_HALF]},
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "boxed_answer": None},
    ]


async def test_a_trace_and_logprobs_share_a_chunk(client, engine, chat_body):
    def script(request):
        both = {"logprobs": (score(0),), "traces": ((likeliest(98),),)}
        return [Event((98,), "a", **both), Event((0,), "", "stop", Usage(3, 2, 4), **both)]

    engine.script = script

    chunks = await stream(client, chat_body(trace=1, logprobs=True))

    choices = [chunk["choices"][0] for chunk in chunks]
    assert [(bool(choice["logprobs"]), "trace" in choice) for choice in choices] == [
        (False, False),
        (True, True),
        (False, False),
    ]


@pytest.mark.parametrize("trace", [0, 11, "3", 1.5, True], ids=repr)
async def test_a_trace_has_limits(client, engine, chat_body, trace):
    response = await client.post(URL, json=chat_body(trace=trace))

    assert (response.status_code, response.json()["error"]["param"]) == (400, "trace")
    assert not engine.requests
