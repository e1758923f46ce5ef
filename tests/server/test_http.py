"""What holds on every route: error shape, keys, body limit, request ids, the log."""

import asyncio
import gc
import json
import logging
import re
import tracemalloc

import pytest

from server.metrics import REJECTIONS
from tests.waiting import until
from trm.logs import JsonFormatter, TextFormatter

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


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("GET", "/models", "/v1/models"),
        ("POST", "/v1/v1/messages", "/v1/messages"),
        ("POST", "/v1/solve", "/solve"),
        ("GET", f"/models/{'a' * 500}", f"/v1/models/{'a' * 500}"[:200]),
        ("POST", "/v1/embeddings", None),
        ("GET", "/nowhere", None),
        ("GET", "/v1/", None),
    ],
)
async def test_a_base_url_with_a_v1_too_few_or_too_many_is_told_so(client, method, path, meant):
    response = await client.request(method, path)

    advice = f"a base URL that makes it {meant} is right" if meant else "/openapi.json lists them all"
    place = f"{method} {path}"[:200]
    assert response.json()["error"]["message"] == f"{place}: no such route; {advice}"


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


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/metrics", 200),
        ("/", 200),
        ("/playground/main.js", 200),
        ("/version", 401),
        ("/metrics/", 401),
        ("/playground", 401),
        ("/v1/models", 401),
    ],
)
async def test_public_paths_need_no_key(make_app, connect, path, status):
    app = make_app(api_key=["one"], public_paths=["/metrics", "/", "/playground/*"])
    async with connect(app) as client:
        assert (await client.get(path)).status_code == status


async def test_keys_of_a_file_open_the_server_too(make_app, connect, tmp_path):
    (tmp_path / "keys").write_text("two\n")
    async with connect(make_app(api_key=["one"], api_key_file=tmp_path / "keys")) as client:
        for key, status in (("one", 200), ("two", 200), ("three", 401)):
            response = await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == status


# Pages of other origins

PAGE = "https://page.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


async def test_other_origins_are_out_by_default(client):
    response = await client.get("/version", headers={"Origin": PAGE})

    assert not [name for name in response.headers if name.startswith("access-control")]
    assert (await client.options("/solve", headers=PREFLIGHT)).status_code == 405


@pytest.mark.parametrize("allowed", [PAGE, "*"])
async def test_pages_of_allowed_origins_ask_first_without_a_key_and_may_read_errors_and_headers(
    make_app, connect, engine, allowed
):
    engine.chat.encode = lambda messages, **_: 1 / 0
    async with connect(make_app(api_key=["one"], cors_origins=[allowed])) as client:
        preflight = await client.options("/solve", headers=PREFLIGHT)
        page = {"Origin": PAGE, "Authorization": "Bearer one"}
        responses = [
            await client.get("/version", headers=page),
            await client.post("/solve", json=QUESTION, headers={"Origin": PAGE}),
            await client.post("/solve", json={}, headers=page),
            await client.post("/solve", json=QUESTION, headers=page),
        ]

    assert preflight.status_code == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert [response.status_code for response in responses] == [200, 401, 400, 500]
    for response in (preflight, *responses):
        assert response.headers["access-control-allow-origin"] == allowed
        assert "access-control-allow-credentials" not in response.headers
    assert all(response.headers["access-control-expose-headers"] == "*" for response in responses)
    assert responses[1].headers["x-request-id"]


async def test_pages_of_origins_that_are_not_allowed_learn_nothing(make_app, connect):
    async with connect(make_app(cors_origins=["https://other.example"])) as client:
        assert (await client.options("/solve", headers=PREFLIGHT)).status_code == 400
        response = await client.get("/version", headers={"Origin": PAGE})

    assert "access-control-allow-origin" not in response.headers


# Body


async def test_a_body_that_trickles_in_is_a_408(make_app, connect, engine):
    async def trickle():
        yield b'{"question": '
        await asyncio.sleep(5)
        yield b'"a"}'

    async with connect(make_app(body_timeout_seconds=0.05)) as client:
        response = await client.post("/solve", content=trickle())
        metrics = (await client.get("/metrics")).text

    assert (response.status_code, response.json()["error"]["code"]) == (408, "body_timeout")
    assert "0.05 s" in response.json()["error"]["message"]
    assert response.headers["connection"] == "close"
    assert 'trm_request_rejected_total{reason="slow_body"} 1.0' in metrics


@pytest.mark.parametrize(
    "body",
    [
        {str(number): 1 for number in range(5)},
        {"messages": [{"role": "user", "content": "a"}] * 3},
        {"metadata": {"a": [[{"b": 1, "c": 2}], {"d": 3}], "e": 4}},
    ],
    ids=["flat", "in a list", "deep"],
)
async def test_a_body_of_too_many_fields_is_not_looked_at(make_app, connect, body):
    async with connect(make_app(max_body_fields=4)) as client:
        response = await client.post("/v1/chat/completions", json=body)

    assert response.status_code == 400
    assert "more than 4 fields" in response.json()["error"]["message"]


async def test_colons_are_no_fields(make_app, connect):
    async with connect(make_app(max_body_fields=4)) as client:
        assert (await client.post("/solve", json={"question": ["::::", ":::"], "n": 1})).status_code == 200


async def test_a_list_of_wrong_things_is_refused_at_its_first(client):
    response = await client.post("/v1/chat/completions", json={"messages": [1] * 100_000})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0"


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


@pytest.mark.parametrize("lines", [["gzip"], ["br"], ["identity, gzip"], ["identity", "gzip"]], ids=str)
async def test_an_encoded_body_is_a_415_that_names_the_coding(client, lines):
    coding = ", ".join(lines)
    headers = [("Content-Encoding", line) for line in lines]
    response = await client.post("/solve", content=b"\x1f\x8b", headers=headers)
    metrics = (await client.get("/metrics")).text

    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_content_encoding")
    assert f"Content-Encoding {coding}:" in response.json()["error"]["message"]
    assert 'trm_request_rejected_total{reason="encoded"} 1.0' in metrics
    assert (await client.get("/health", headers={"Content-Encoding": "identity"})).status_code == 200


async def test_a_byte_order_mark_before_the_json_is_skipped(client):
    headers = {"Content-Type": "application/json"}
    with_mark = await client.post("/solve", content=b'\xef\xbb\xbf{"question": "a"}', headers=headers)
    twice = await client.post("/solve", content=b'\xef\xbb\xbf\xef\xbb\xbf{"question": "a"}', headers=headers)

    assert (with_mark.status_code, twice.status_code) == (200, 400)


FAR_TOO_LONG = "7" * 500_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": FAR_TOO_LONG}]}, "messages"),
        ("/v1/completions", {"prompt": ["a", FAR_TOO_LONG]}, "prompt"),
        ("/solve", {"question": FAR_TOO_LONG}, "question"),
        ("/tokenize", {"prompt": FAR_TOO_LONG}, "prompt"),
    ],
)
async def test_a_text_far_beyond_the_context_is_refused_and_nothing_of_it_kept(app, engine, path, body, param):
    content = json.dumps(body).encode()
    headers = [(b"host", b"test"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": headers, "root_path": "", "scheme": "http"}

    async def ask():
        parts, said = [{"type": "http.request", "body": content, "more_body": False}], []

        async def receive():
            return parts.pop() if parts else await asyncio.Event().wait()

        async def send(message):
            said.append(message)

        await app(dict(scope), receive, send)
        engine.chat.conversations.clear()
        return said[0]["status"], json.loads(said[1]["body"])["error"]

    status, error = await ask()
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert re.search(r"more than 400( tokens)?", error["message"])
    gc.collect()
    gc.disable()  # a cycle of references keeps what it holds until the collector comes by
    tracemalloc.start()
    try:
        for _ in range(5):
            await ask()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < 500_000 < peak


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
    await until(lambda: engine.requests)
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


def logged(caplog):
    """What the log says of each request."""
    return [vars(record) for record in caplog.records if record.name == "server.middleware"]


async def test_the_log_has_id_counts_and_time(client, engine, caplog):
    caplog.set_level(logging.INFO)

    await client.post("/solve", json={**QUESTION, "n": 2}, headers={"X-Request-Id": "abc"})
    await client.post("/solve", json={"question": 5})
    await client.get("/v1/models")

    solved, refused, listed = logged(caplog)
    facts = {"request_id": "abc", "method": "POST", "path": "/solve", "status": 200, "completion_tokens": 6}
    assert facts.items() <= solved.items()
    assert solved["prompt_tokens"] == 2 * len(engine.requests[0].prompt_ids)
    assert solved["finish_reasons"] == {"stop": 2}
    assert solved["ms"] >= 0
    assert (refused["status"], refused["reason"]) == (400, "invalid")
    assert "prompt_tokens" not in refused
    assert (listed["path"], listed["status"]) == ("/v1/models", 200)


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()], ids=["json", "text"])
async def test_the_log_holds_nothing_of_prompts_replies_keys_and_queries(make_app, connect, engine, caplog, formatter):
    """Neither where all goes well nor where it fails."""
    caplog.set_level(logging.DEBUG)
    engine.chat.encode = lambda messages, **_: 1 / 0 if "fail" in str(messages) else [1]
    secret = {"Authorization": "Bearer sesame", "Cookie": "sesame", "User-Agent": "sesame"}
    async with connect(make_app(api_key=["sesame"])) as client:
        for body in (
            {"question": "sesame"},
            {"question": "sesame fail"},
            {"question": "sesame", "sesame": 1},
            {"question": ["sesame", 5]},
            {"messages": [{"role": "user", "content": "sesame"}], "stream": True},
        ):
            for path in ("/solve?key=sesame", "/v1/chat/completions?sesame"):
                await client.post(path, json=body, headers=secret)
        await client.post("/solve", content=b'{"sesame', headers=secret)
        await client.get("/solve", headers={"Authorization": "sesame"})

    ours = [record for record in caplog.records if not record.name.startswith("http")]  # the test's own client logs
    text = "\n".join(formatter.format(record) for record in ours)
    assert text.count("request") >= 12
    assert "ZeroDivisionError" in text
    assert "sesame" not in text
    assert "boxed" not in text


async def test_probes_do_not_fill_the_log(client, caplog):
    caplog.set_level(logging.INFO)

    for path in ("/health", "/ready", "/metrics"):
        await client.get(path)

    assert not logged(caplog)


async def test_a_path_cannot_forge_a_line_of_the_log(client, caplog):
    caplog.set_level(logging.INFO)

    await client.get("/a%0Arequest%20b:%20forged")

    (record,) = [r for r in caplog.records if r.name == "server.middleware"]
    for formatter in (TextFormatter(), JsonFormatter()):
        assert "\n" not in formatter.format(record)
    assert "path=/a" not in TextFormatter().format(record)
    assert json.loads(JsonFormatter().format(record))["path"] == "/a\nrequest b: forged"


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
