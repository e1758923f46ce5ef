"""What holds on every route: error shape, keys, body limit, request ids, the log."""

import asyncio
import json
import logging
import re

import pytest

from server.metrics import REJECTIONS

pytestmark = pytest.mark.anyio

SHAPE = {"message", "type", "param", "code"}
QUESTION = {"question": "a secret question"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/solve", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("POST", "/solve/", 404, "unknown_url"),
    ],
)
async def test_what_no_route_takes_is_refused_in_shape(client, method, path, status, code):
    response = await client.request(method, path)

    assert response.status_code == status
    assert set(response.json()["error"]) == SHAPE
    assert response.json()["error"]["code"] == code


async def test_an_unexpected_exception_is_a_500_that_leaks_nothing(client, engine, caplog):
    engine.submit = lambda *_: 1 / 0

    response = await client.post("/solve", json=QUESTION)

    assert response.status_code == 500
    assert set(response.json()["error"]) == SHAPE
    assert response.headers["x-request-id"]
    assert "division" not in response.text
    assert "ZeroDivisionError" in caplog.text


# Keys


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer one two", 401),
        ("Bearer ", 401),
        ("one", 401),
        ("Basic one", 401),
        ("Bearer one", 200),
        ("bearer  two", 200),
        ("Bearer schlüssel", 200),
    ],
)
async def test_a_key_opens_the_server(make_app, connect, header, status):
    headers = {} if header is None else {"Authorization": header.encode()}
    async with connect(make_app(api_key=["one", "two", "schlüssel"])) as client:
        response = await client.get("/v1/models", headers=headers)

    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("path", "status"),
    [("/health", 200), ("/ready", 200), ("/metrics", 401), ("/version", 401), ("/nowhere", 401), ("/docs", 401)],
)
async def test_only_probes_pass_without_a_key(make_app, connect, path, status):
    async with connect(make_app(api_key=["one"])) as client:
        assert (await client.get(path)).status_code == status


# Body


async def test_a_large_body_is_a_413_and_never_read_whole(make_app, connect):
    sent = []

    async def chunks():
        for _ in range(100):
            sent.append(b"x" * 50)
            yield sent[-1]

    async with connect(make_app(max_body_bytes=100)) as client:
        announced = await client.post("/solve", content=b"x" * 101)
        chunked = await client.post("/solve", content=chunks())
        fitting = await client.post("/solve", json={"question": "x" * (100 - len('{"question":""}'))})

    assert (announced.status_code, chunked.status_code, fitting.status_code) == (413, 413, 200)
    assert announced.json()["error"]["code"] == "body_too_large"
    assert "100 bytes" in announced.json()["error"]["message"]
    assert len(sent) == 3


# Ids and log


@pytest.mark.parametrize("given", ["abc-123", "a" * 128, "trace:1/2+3="])
async def test_a_request_id_is_taken_over(client, given):
    assert (await client.get("/health", headers={"X-Request-Id": given})).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "a\tb", "ä"])
async def test_a_request_id_that_could_forge_the_log_is_replaced(client, given):
    response = await client.get("/health", headers={"X-Request-Id": given.encode()})

    assert response.headers["x-request-id"].isalnum()


async def after_a_wait(client, engine, body):
    """The response to a chat that gets its first token 50 ms after the engine got it."""
    engine.hold()
    waiting = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
    while not engine.requests:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    engine.release()
    return await waiting


async def test_a_response_says_where_its_time_went(client, engine, chat_body):
    headers = (await after_a_wait(client, engine, chat_body())).headers

    timings = dict(item.split(";dur=") for item in headers["server-timing"].split(", "))
    ms = {name: float(duration) for name, duration in timings.items()}
    assert list(ms) == ["prepare", "queue", "first_token", "total"]
    assert ms["total"] >= 40  # the wait began a little earlier than the request
    assert ms["prepare"] < ms["total"]
    assert ms["prepare"] + ms["first_token"] <= ms["total"] + 0.2  # rounded, each of them
    assert int(headers["openai-processing-ms"]) == pytest.approx(ms["total"], abs=1)


async def test_what_is_not_known_of_its_time_a_response_leaves_out(client, engine, chat_body):
    streamed = await after_a_wait(client, engine, chat_body(stream=True))
    probed = await client.get("/health")

    assert re.fullmatch(r"prepare;dur=[\d.]+, total;dur=[\d.]+", streamed.headers["server-timing"])
    assert re.fullmatch(r"total;dur=[\d.]+", probed.headers["server-timing"])
    assert int(probed.headers["openai-processing-ms"]) < 5000


async def test_the_log_has_id_counts_and_time_but_no_text(client, engine, caplog):
    caplog.set_level(logging.INFO)

    await client.post("/solve", json=QUESTION, headers={"X-Request-Id": "abc"})

    prompt_tokens = len(engine.requests[0].prompt_ids)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "server.middleware"]
    assert line.startswith(f"request abc: POST '/solve' 200, {prompt_tokens} prompt tokens, 3 completion tokens, ")
    assert line.endswith(" ms")
    assert "secret" not in caplog.text
    assert "boxed" not in caplog.text


async def test_probes_do_not_fill_the_log(client, caplog):
    caplog.set_level(logging.INFO)

    for path in ("/health", "/ready", "/metrics"):
        await client.get(path)

    assert not [r for r in caplog.records if r.name == "server.middleware"]


async def test_a_path_cannot_forge_a_line_of_the_log(client, caplog):
    caplog.set_level(logging.INFO)

    await client.get("/a%0Arequest%20b:%20forged")

    (line,) = [r.getMessage() for r in caplog.records if r.name == "server.middleware"]
    assert "\n" not in line


async def test_refused_work_is_counted_by_reason(client, app, make_app, connect):
    await client.post("/solve", json={})
    await client.post("/solve", json={})
    await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "model": "x"})
    await client.get("/nowhere")

    text = (await client.get("/metrics")).text
    assert 'trm_request_rejected_total{reason="invalid"} 2.0' in text
    assert 'trm_request_rejected_total{reason="not_found"} 1.0' in text


def test_every_reason_has_its_own_name():
    assert len(set(REJECTIONS.values())) == len(REJECTIONS)


async def test_bodies_are_json_of_their_models(client):
    schema = (await client.get("/openapi.json")).json()

    body = schema["paths"]["/solve"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/SolveRequest"}
    assert json.dumps(schema)
