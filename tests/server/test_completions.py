"""POST /v1/completions: what it has to itself; the rest is the chat route's, and tested there."""

import pytest

from tests.server.conftest import byte_ids, read_stream, score, scored
from trm.engine.request import Event, TokenLogprobs, Usage

pytestmark = pytest.mark.anyio

URL = "/v1/completions"


async def test_a_reply(client, engine):
    response = await client.post(URL, json={"prompt": "2+2="}, headers={"X-Request-Id": "abc"})

    body = response.json()
    assert response.status_code == 200, body
    assert body.pop("created") > 0
    assert body == {
        "id": "cmpl-abc",
        "object": "text_completion",
        "model": "test/model",
        "choices": [
            {
                "index": 0,
                "text": "so \\boxed{72}",
                "logprobs": None,
                "finish_reason": "stop",
                "boxed_answer": "72",
            }
        ],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 3,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "trm": {"supervision_steps_mean": 4.0, "draft_tokens": 0, "accepted_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([7, 0, 9], [(7, 0, 9)]),
        ([[7], [8, 9]], [(7,), (8, 9)]),
    ],
    ids=str,
)
async def test_a_prompt_is_text_or_ids_or_a_list_of_either(client, engine, prompt, ids):
    body = (await client.post(URL, json={"prompt": prompt})).json()

    assert [request.prompt_ids for request in engine.requests] == ids
    assert [choice["index"] for choice in body["choices"]] == list(range(len(ids)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert engine.chat.conversations == []  # no template


async def test_samples_of_a_prompt_are_side_by_side_and_share_its_seed(client, engine):
    engine.script = lambda request: [
        Event((5,), f"{request.prompt_ids[0]}.{request.params.sample_index}", "stop", Usage(10, 2, 8, cached_tokens=3))
    ]

    body = (await client.post(URL, json={"prompt": [[7], [8]], "n": 2, "temperature": 1})).json()

    assert [choice["text"] for choice in body["choices"]] == ["7.0", "7.1", "8.0", "8.1"]
    assert len({request.params.seed for request in engine.requests}) == 1
    assert body["usage"]["prompt_tokens"] == 20
    assert body["usage"]["completion_tokens"] == 8
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}


async def test_every_field_reaches_the_engine(client, engine):
    fields = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 11, "logprobs": 3}
    fields |= {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.25}
    fields |= {"halt_threshold": 0.75, "halt_tolerance": 0.01}
    rest = {"stop": "x", "ignore_eos": True, "reasoning_effort": "medium", "logit_bias": {"5": 1}, "user": "me"}
    no_ops = {"echo": False, "suffix": "", "best_of": 1, "metadata": {"a": "b"}}

    response = await client.post(URL, json={"prompt": "a", **fields, **rest, **no_ops})

    assert response.status_code == 200, response.text
    params = engine.requests[0].params
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.stop, params.ignore_eos, params.n_supervision) == (("x",), True, 2)
    assert params.logit_bias == ((5, 1),)


async def test_defaults(client, engine):
    engine.max_model_len = 1000
    await client.post(URL, json={"prompt": "a"})

    params = engine.requests[0].params
    assert (params.temperature, params.max_tokens, params.logprobs) == (0, 512, None)


async def test_each_prompt_is_clipped_to_the_room_that_it_leaves(client, engine):
    await client.post(URL, json={"prompt": ["a", "a" * 399], "max_tokens": 300})

    assert [request.params.max_tokens for request in engine.requests] == [300, 1]


async def test_a_stream(client):
    chunks = await read_stream(client, URL, {"prompt": "a", "stream_options": {"include_usage": True}})

    common = {"index": 0, "logprobs": None, "finish_reason": None}
    assert [chunk["choices"] for chunk in chunks] == [
        [{**common, "text": "so "}],
        [{**common, "text": "\\boxed{72}"}],
        [{**common, "text": "", "finish_reason": "stop", "boxed_answer": "72"}],
        [],
    ]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1]["usage"]["total_tokens"] == 4
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


async def test_the_usage_so_far_counts_prompts_that_wait(client, engine):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await read_stream(client, URL, {"prompt": ["aaa", "b"], "stream_options": options})

    assert [chunk["usage"]["prompt_tokens"] for chunk in chunks] == [4] * len(chunks)
    assert chunks[0]["usage"]["completion_tokens"] == 1
    assert chunks[-1]["usage"]["completion_tokens"] == 6


async def test_a_stream_of_several_prompts_ends_each_choice_once(client, engine):
    chunks = await read_stream(client, URL, {"prompt": ["a", "b"], "n": 2})

    for index in range(4):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == "so \\boxed{72}"
        assert [choice["finish_reason"] for choice in own] == [None, None, "stop"]


async def test_another_model_is_a_404(client, engine):
    response = await client.post(URL, json={"prompt": "a", "model": "gpt-4"})

    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_prompt_without_room_for_a_reply_refuses_all_of_them(client, engine):
    response = await client.post(URL, json={"prompt": ["a", "a" * 400]})

    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert not engine.requests


# Log probabilities


async def test_logprobs_are_parallel_lists(client, engine):
    engine.script = scored

    choice = (await client.post(URL, json={"prompt": "x", "logprobs": 2})).json()["choices"][0]

    assert choice["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.25, -0.5, -0.75],
        "top_logprobs": [
            {"a": 0.0, "<|im_end|>": -0.5},
            {"bytes:\\xc3": -0.5},
            {"": 0.0, "bytes:\\xa9": -0.75},  # the model has more ids than its tokenizer
        ],
        "text_offset": [0, 1, 1],
    }
    assert choice["text"] == "aé"


async def test_the_likeliest_of_tokens_that_are_spelt_alike_is_told(client, engine):
    unknown = TokenLogprobs(-3.0, ((9998, -1.0), (9999, -2.0)))
    engine.script = lambda request: [Event((9997,), "", "length", Usage(3, 1, 4), logprobs=(unknown,))]

    choice = (await client.post(URL, json={"prompt": "x", "logprobs": 2})).json()["choices"][0]

    assert choice["logprobs"]["top_logprobs"] == [{"": -1.0}]
    assert choice["logprobs"]["token_logprobs"] == [-3.0]


async def test_the_pieces_of_a_stream_join_to_the_whole(client, engine):
    def script(request):
        """The texts of the samples differ in length, so that their offsets do too."""
        text = b"abc"[: 2 + request.params.sample_index]
        for byte in text:
            yield Event(byte_ids([byte]), chr(byte), logprobs=(score(1),))
        yield Event((0,), "", "stop", Usage(3, len(text) + 1, 12), logprobs=(score(9),))

    engine.script = script
    body = {"prompt": "x", "n": 2, "temperature": 1, "logprobs": 0}
    whole = (await client.post(URL, json=body)).json()["choices"]
    chunks = await read_stream(client, URL, body)

    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[-1]["logprobs"] is None
        for name, found in whole[index]["logprobs"].items():
            assert [item for choice in own[:-1] for item in choice["logprobs"][name]] == found
    assert whole[1]["logprobs"]["text_offset"] == [0, 1, 2]
    assert whole[1]["logprobs"]["tokens"] == ["a", "b", "c"]
