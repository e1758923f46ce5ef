"""What a busy, starting, stopping or broken server says, and that nobody loses a place or keeps one."""

import asyncio
import threading

import pytest

from server.app import attach, create_app
from server.settings import ServeSettings
from trm.errors import DeviceError, Overloaded

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["chat", "stream", "solve"])
def post(request, client, chat_body):
    """Send one decoding request by each of the routes."""
    path, body = {
        "chat": ("/v1/chat/completions", chat_body()),
        "stream": ("/v1/chat/completions", chat_body(stream=True)),
        "solve": ("/solve", {"question": "2+2?"}),
    }[request.param]
    return lambda **fields: client.post(path, json={**body, **fields})


async def samples_of(client, name):
    """Every sample of this metric that is not 0."""
    lines = [line.split(" ") for line in (await client.get("/metrics")).text.splitlines() if line.startswith(name)]
    return {name: float(value) for name, value in lines if float(value)}


async def test_places_are_reserved_before_anything_is_tokenised(post, engine, monkeypatch):
    encode, reserved = engine.chat.encode, []
    monkeypatch.setattr(engine.chat, "encode", lambda text, **_: (reserved.append(engine.reserved), encode(text))[1])

    assert (await post(n=3, temperature=1)).status_code == 200

    assert reserved == [3]
    assert engine.reserved == 0


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(post, client, engine, monkeypatch):
    monkeypatch.setattr(engine.chat, "encode", lambda text, **_: pytest.fail("tokenised in vain"))
    engine.refuse = Overloaded(
        "the queue is full: 8 requests wait, and at most 8 may; try again in 7 s", retry_after_s=7
    )

    response = await post()

    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"] == {
        "message": str(engine.refuse),
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    assert await samples_of(client, "trm_request_rejected_total") == {
        'trm_request_rejected_total{reason="overloaded"}': 1
    }


async def test_a_prompt_that_cannot_be_served_gives_its_places_back(post, engine, monkeypatch):
    monkeypatch.setattr(engine.chat, "encode", lambda text, **_: [1] * 400)
    assert (await post()).json()["error"]["code"] == "context_length_exceeded"
    monkeypatch.setattr(engine.chat, "encode", lambda text, **_: 1 / 0)
    assert (await post()).status_code == 500

    assert engine.reserved == 0


async def test_a_client_that_leaves_while_its_prompt_is_tokenised_gives_its_places_back(client, engine, monkeypatch):
    tokenising, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(engine.chat, "encode", lambda text, **_: (tokenising.set(), go_on.wait(5), [1])[-1])
    request = asyncio.create_task(client.post("/solve", json={"question": "a", "n": 4}))
    await asyncio.to_thread(tokenising.wait, 5)
    assert engine.reserved == 4

    request.cancel()
    await asyncio.wait([request])
    assert engine.reserved == 0
    go_on.set()
    assert not engine.requests


async def test_a_request_that_takes_too_long_is_a_504_and_nobody_else_is_disturbed(make_app, connect, engine, say):
    """The slow one is held; the quick one comes while it waits."""
    held = threading.Event()

    def script(request):
        if request.params.max_tokens == 99:
            held.wait(10)
        yield from say("done")(request)

    engine.script = script
    async with connect(make_app(request_timeout_seconds=1.5)) as client:
        slow = asyncio.create_task(client.post("/solve", json={"question": "a", "max_tokens": 99}))
        quick = await client.post("/solve", json={"question": "a"})
        response = await slow
        rejected = await samples_of(client, "trm_request_rejected_total")
    held.set()

    assert quick.status_code == 200
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert "1.5 s" in response.json()["error"]["message"]
    slow_handle, quick_handle = sorted(engine.handles, key=lambda handle: handle.request.params.max_tokens)
    assert (slow_handle.cancelled, quick_handle.cancelled) == (True, False)
    assert rejected == {'trm_request_rejected_total{reason="timeout"}': 1}


async def test_a_stream_that_takes_too_long_ends_with_an_error_and_done(make_app, connect, engine, chat_body, say):
    held = threading.Event()

    def script(request):
        first, *rest = say("so")(request)
        yield first
        held.wait(5)
        yield from rest

    engine.script = script
    async with connect(make_app(request_timeout_seconds=0.3)) as client:
        response = await client.post("/v1/chat/completions", json=chat_body(stream=True))
        rejected = await samples_of(client, "trm_request_rejected_total")
    held.set()

    assert response.status_code == 200
    *_, text, error, done = response.text.strip().split("\n\n")
    assert '"content":"so"' in text
    assert '"code":"timeout"' in error
    assert done == "data: [DONE]"
    assert rejected == {'trm_request_rejected_total{reason="timeout"}': 1}


async def test_a_stream_that_fails_is_counted_too(client, engine, chat_body, say):
    engine.script = say("so", finish="error", error=DeviceError("a logit is not finite"))

    response = await client.post("/v1/chat/completions", json=chat_body(stream=True))

    assert response.status_code == 200
    assert '"code":"device_error"' in response.text
    assert await samples_of(client, "trm_request_rejected_total") == {'trm_request_rejected_total{reason="failed"}': 1}


async def test_a_starting_server_is_alive_and_takes_no_work_until_it_has_an_engine(connect, engine, chat_body):
    app = create_app(None, ServeSettings(served_model_name="test/model"))
    async with connect(app) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/version")).json()["model"] == "test/model"
        assert "trm_request_rejected" in (await client.get("/metrics")).text
        for response in (
            await client.get("/ready"),
            await client.get("/v1/models"),
            await client.post("/v1/chat/completions", json=chat_body()),
            await client.post("/solve", json={}),
        ):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "starting")

        attach(app, engine)

        assert (await client.get("/ready")).status_code == 200
        assert (await client.post("/solve", json={"question": "a"})).status_code == 200
        assert "trm_num_requests_running 1.0" in (await client.get("/metrics")).text
