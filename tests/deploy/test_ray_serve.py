"""What deploy/ray_serve.py adds to Ray Serve, without a Ray: tests/e2e/operations/test_ray.py has one."""

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Receive, Scope, Send

from server import errors
from server.app import add_middleware
from server.metrics import Metrics
from server.settings import ServeSettings
from trm.errors import ConfigError, DeviceError

with warnings.catch_warnings(action="ignore"):  # pydantic's, of Ray
    import ray_serve
    from ray.exceptions import ActorDiedError, ObjectLostError
    from ray.serve.exceptions import BackPressureError

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; x=y")]}


def part(body: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


WHOLE = [[START], [part(b"1"), part(b"2", more=False)]]


class Response:
    """What a deployment handle returns: batches of messages, or an error at some point."""

    def __init__(self, script: Sequence[list[Message] | Exception]) -> None:
        self.script = script
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[list[Message]]:
        for step in self.script:
            await asyncio.sleep(0)
            if isinstance(step, Exception):
                raise step
            if not step:
                await asyncio.Event().wait()
            yield step

    def cancel(self) -> None:
        self.cancelled = True


class Decoders:
    """A deployment whose calls go by these scripts, one after the other."""

    def __init__(self, *scripts: Sequence[list[Message] | Exception]) -> None:
        self.responses = [Response(script) for script in scripts]
        self.calls: list[tuple[dict[str, Any], bytes]] = []

    def remote(self, request: dict[str, Any], body: bytes) -> Any:
        self.calls.append((request, body))
        return self.responses[len(self.calls) - 1]


def entrance(decoders: Decoders, **settings: Any) -> FastAPI:
    app = FastAPI()
    errors.install(app)
    add_middleware(app, ServeSettings(**settings), Metrics())
    app.mount("/", ray_serve.Forward(decoders.remote, settings.get("request_timeout_seconds", 0)))
    return app


async def ask(app: FastAPI, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.post("/solve?a=b", content=b"question", headers=headers)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_the_request_reaches_the_decoder_as_it_was() -> None:
    decoders = Decoders(WHOLE)

    response = await ask(entrance(decoders), **{"X-Request-Id": "mine", "X-Other": "kept"})

    ((request, body),) = decoders.calls
    headers = dict(request["headers"])
    assert (request["method"], request["path"], request["query_string"], body) == (
        "POST",
        "/solve",
        b"a=b",
        b"question",
    )
    assert (headers[b"x-request-id"], headers[b"x-other"]) == (b"mine", b"kept")
    assert (response.text, response.headers["x-request-id"]) == ("12", "mine")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "script",
    [
        [ActorDiedError()],
        [[START], ActorDiedError()],
        [[START, part(b"half")], ActorDiedError()],
        [[START, part(b"half")], ObjectLostError("00" * 28, "", "")],
    ],
    ids=["at once", "after the head", "half-way", "machine"],
)
async def test_a_reply_is_asked_for_again_until_it_is_whole(script: Any) -> None:
    decoders = Decoders(script, WHOLE)

    response = await ask(entrance(decoders), **{"X-Request-Id": "mine"})

    assert (response.status_code, response.text) == (200, "12")
    first, second = decoders.calls
    assert first == second


@pytest.mark.anyio
async def test_a_request_that_kills_its_decoders_is_given_up() -> None:
    decoders = Decoders(*[[ActorDiedError()]] * 4)

    response = await ask(entrance(decoders))

    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_lost")
    assert len(decoders.calls) == 3


@pytest.mark.anyio
async def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    decoders = Decoders([[STREAM], [part(b"data: 1\n\n")], ActorDiedError()], WHOLE)

    response = await ask(entrance(decoders))

    assert response.status_code == 200
    one, error, done, end = response.text.split("\n\n")
    assert (one, done, end) == ("data: 1", "data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert len(decoders.calls) == 1


@pytest.mark.anyio
async def test_a_stream_that_has_not_begun_is_asked_for_again() -> None:
    decoders = Decoders([ActorDiedError()], [[STREAM], [part(b"data: 1\n\n"), part(b"", more=False)]])

    assert (await ask(entrance(decoders))).text == "data: 1\n\n"


@pytest.mark.anyio
async def test_a_full_queue_is_429_and_a_long_wait_504() -> None:
    full = await ask(entrance(Decoders([BackPressureError(5, 5)])))
    slow = await ask(entrance(Decoders([[]]), request_timeout_seconds=0.05))

    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert full.headers["Retry-After"] == "1"
    assert (slow.status_code, slow.json()["error"]["code"]) == (504, "timeout")


@pytest.mark.anyio
async def test_who_has_no_key_reaches_no_decoder() -> None:
    decoders = Decoders(WHOLE, WHOLE)
    app = entrance(decoders, api_key="secret")

    assert (await ask(app)).status_code == 401
    assert (await ask(app, Authorization="Bearer secret")).status_code == 200
    assert len(decoders.calls) == 1


@pytest.mark.anyio
async def test_a_client_that_leaves_takes_its_request_along() -> None:
    decoders = Decoders([[STREAM], []])
    arrived = asyncio.Event()
    pending: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if not pending:
            await arrived.wait()
            return {"type": "http.disconnect"}
        return pending.pop()

    async def send(message: Message) -> None:
        arrived.set()

    scope = {"type": "http", "method": "POST", "path": "/solve", "query_string": b"", "headers": []}
    await asyncio.wait_for(entrance(decoders)(scope, receive, send), 5)

    assert decoders.responses[0].cancelled


async def chatty(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body, then talks until the client leaves."""
    await send(START)
    await send(part((await receive())["body"]))
    left = await receive()
    scope["seen"].append(left["type"])


@pytest.mark.anyio
async def test_closing_the_response_is_a_disconnect_for_the_application() -> None:
    seen: list[str] = []
    response = ray_serve.run(chatty, {"type": "http", "seen": seen}, b"body")
    messages: list[Message] = []
    async for some in response:
        messages += some
        if len(messages) == 2:
            break

    await response.aclose()

    assert messages == [START, part(b"body")]
    assert seen == ["http.disconnect"]


class Engine:
    """An engine's health."""

    def __init__(self, alive: bool) -> None:
        self._alive = alive

    def alive(self) -> bool:
        return self._alive


@pytest.fixture
def make_decoder() -> Callable[..., Any]:
    def make(alive: bool) -> Any:
        decoder = object.__new__(ray_serve.Decoder.func_or_class)
        decoder._engine = Engine(alive)
        decoder._engine.close = lambda: None
        decoder._app = chatty
        return decoder

    return make


@pytest.mark.anyio
async def test_a_decoder_without_its_engine_is_unhealthy_and_exits_rather_than_answer(
    make_decoder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: list[int] = []

    def leave(status: int) -> None:
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr("os._exit", leave)
    dead = make_decoder(alive=False)

    make_decoder(alive=True).check_health()
    with pytest.raises(DeviceError):
        dead.check_health()
    assert await dead.ready() is False
    with pytest.raises(SystemExit):
        await anext(dead.respond({"type": "http", "seen": []}, b""))
    assert statuses == [1]


def test_metrics_of_all_replicas_are_one_exposition() -> None:
    one, two = Metrics(), Metrics()
    one.rejected.labels("overloaded").inc(2)
    two.rejected.labels("overloaded").inc(3)
    two.first_token_s.labels("m").observe(0.3)

    text = ray_serve.merge_expositions({"one": one.exposition(), "two": two.exposition()}).decode()

    families = {family.name: family for family in text_string_to_metric_families(text)}
    rejected = {
        sample.labels["replica"]: sample.value
        for sample in families["trm_request_rejected"].samples
        if sample.name.endswith("_total") and sample.labels["reason"] == "overloaded"
    }
    assert rejected == {"one": 2, "two": 3}
    assert text.count("# TYPE trm_time_to_first_token_seconds histogram") == 1
    assert 'trm_time_to_first_token_seconds_count{model_name="m",replica="two"} 1.0' in text


def test_settings_come_from_arguments_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRM_MAX_ROWS", "3")
    monkeypatch.setenv("TRM_MAX_QUEUE", "9")

    application = ray_serve.build({"max_rows": 5, "num_threads": 2, "drain_seconds": 7})

    decoder = application._bound_deployment.init_args[0]._bound_deployment
    assert decoder.init_args[0].max_rows == 5
    assert (decoder.max_ongoing_requests, decoder.max_queued_requests) == (5, 9)
    assert decoder.ray_actor_options["num_cpus"] == 2


@pytest.mark.parametrize(
    ("args", "named"), [({"port": 1}, "port"), ({"max_rows": 0}, "--max-rows"), ({"colour": "red"}, "colour")]
)
def test_settings_that_are_wrong_or_rays_are_refused_by_name(args: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ray_serve.build(args)
