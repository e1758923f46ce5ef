"""Routes on a real engine: what only it can find wrong is told in the fields of the route, and counted by its kind."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.settings import ServeSettings
from tests.trm.conftest import chat_with
from tests.trm.engines import make_engine
from trm.engine import Engine

pytestmark = pytest.mark.anyio

BODIES = {
    "/v1/chat/completions": ("messages", {"messages": [{"role": "user", "content": "a"}]}),
    "/v1/completions": ("prompt", {"prompt": "a"}),
    "/v1/responses": ("input", {"input": "a"}),
    "/solve": ("question", {"question": "a"}),
}
ROUTES = [(route, field, body) for route, (field, body) in BODIES.items()]


@pytest.fixture
def engine(tokenizer: Any) -> Any:
    engine = make_engine(chat_with(tokenizer, 2))
    engine.start()
    yield engine
    assert engine.close()


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engine, ServeSettings(served_model_name="test/model"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize(("route", "field", "body"), ROUTES, ids=BODIES)
@pytest.mark.parametrize(
    ("ids", "code", "message"),
    [
        ([], None, "empty"),
        ([3] * 64, "context_length_exceeded", "64 tokens"),
        ([3, 16], None, "outside 0 to 15"),
    ],
    ids=["empty", "too-long", "unknown-token"],
)
async def test_each_route_names_its_own_field(route, field, body, ids, code, message, client, engine, monkeypatch):
    monkeypatch.setattr(engine.chat, "encode", lambda messages, **_: ids)
    monkeypatch.setattr(engine.chat, "encode_prompt", lambda text, at_most: ids)

    response = await client.post(route, json=body)

    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, field, code)
    assert message in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "code", "reason"),
    [(RuntimeError("CUDA error"), "device_error", "failed"), (KeyError("a bug"), "internal_error", "internal")],
    ids=["device", "bug"],
)
async def test_failures_of_the_device_and_our_own_are_told_apart(
    failure, code, reason, stream, client, engine, monkeypatch
):
    def fail(*args: Any) -> None:
        raise failure

    monkeypatch.setattr(engine.chat, "encode", lambda messages, **_: [3, 4, 5])
    monkeypatch.setattr(engine.loop.runner, "tick", fail)

    response = await client.post("/solve", json={"question": "a", "stream": stream})

    assert response.status_code == (200 if stream else 500)
    assert f'"code":"{code}"' in response.text
    metrics = (await client.get("/metrics")).text
    counted = [
        line for line in metrics.splitlines() if line.startswith("trm_request_rejected_total") and "0.0" not in line
    ]
    assert counted == [f'trm_request_rejected_total{{reason="{reason}"}} 1.0']


async def test_bug_in_a_route_is_counted_as_one(client, engine, monkeypatch):
    monkeypatch.setattr(engine.chat, "encode", lambda messages, **_: 1 / 0)

    response = await client.post("/solve", json={"question": "a"})

    assert response.json()["error"]["code"] == "internal_error"
    assert 'trm_request_rejected_total{reason="internal"} 1.0' in (await client.get("/metrics")).text
