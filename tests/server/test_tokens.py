"""POST /tokenize and /detokenize."""

import threading

import pytest

from tests.server.conftest import byte_ids
from trm.chat import SYSTEM_PROMPTS

pytestmark = pytest.mark.anyio


async def test_a_prompt_is_what_completions_would_decode(client, engine):
    answer = (await client.post("/tokenize", json={"prompt": "2+2=", "model": "test/model"})).json()
    await client.post("/v1/completions", json={"prompt": "2+2="})

    assert answer == {"count": 4, "max_model_len": 400, "tokens": [50, 43, 50, 61], "token_strs": None}
    assert answer["tokens"] == list(engine.requests[0].prompt_ids)


@pytest.mark.parametrize("work", [None, *SYSTEM_PROMPTS])
async def test_messages_are_what_chat_would_decode(client, engine, chat_body, work):
    answer = (await client.post("/tokenize", json=chat_body(work=work))).json()
    await client.post("/v1/chat/completions", json=chat_body(work=work))

    assert answer["tokens"] == list(engine.requests[0].prompt_ids)
    assert answer["count"] == len(answer["tokens"])
    assert engine.chat.conversations[0][0] == {"role": "system", "content": SYSTEM_PROMPTS[work or "full"]}


@pytest.mark.parametrize(("given", "opened"), [(None, True), (True, True), (False, False)])
async def test_the_reply_begins_behind_the_messages_unless_told_otherwise(client, chat_body, given, opened):
    answer = (await client.post("/tokenize", json=chat_body(add_generation_prompt=given))).json()

    assert bytes(answer["tokens"]).endswith(b"assistant:") == opened


async def test_tokens_are_spelt_on_request(client, engine):
    engine.chat.encode_prompt = lambda text, at_most: [*byte_ids("aé".encode()), 0]

    answer = (await client.post("/tokenize", json={"prompt": "aé", "return_token_strs": True})).json()

    assert answer["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]


async def test_an_empty_text_has_no_tokens(client):
    assert (await client.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_ids_become_text_special_ones_by_name(client):
    ids = [0, *byte_ids("é=72".encode())]

    response = await client.post("/detokenize", json={"tokens": ids, "model": "test/model"})

    assert response.json() == {"prompt": "<|im_end|>é=72"}


async def test_an_id_without_a_token_is_named(client):
    response = await client.post("/detokenize", json={"tokens": [1, 5000, 6000]})

    assert "5000" in response.json()["error"]["message"]


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})])
async def test_other_models_are_a_404(client, path, body):
    assert (await client.post(path, json={**body, "model": "gpt-4"})).status_code == 404


async def test_nothing_is_encoded_or_decoded_on_the_event_loop(client, engine, chat_body):
    threads = []

    def note(*_):
        threads.append(threading.current_thread())
        return []

    engine.chat.encode = engine.chat.encode_prompt = note
    engine.chat.decode_with_specials = lambda ids: note() or ""
    for path, body in (
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", chat_body()),
        ("/detokenize", {"tokens": [1]}),
    ):
        assert (await client.post(path, json=body)).status_code == 200

    assert len(threads) == 3
    assert threading.main_thread() not in threads
