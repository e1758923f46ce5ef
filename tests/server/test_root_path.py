"""Behind a path prefix: whether the proxy takes it away or leaves it in place, all is as without one."""

import logging
import re

import httpx
import pytest

from server.routes.playground import PATHS
from server.settings import ServeSettings
from trm.errors import ConfigError

pytestmark = pytest.mark.anyio

PREFIX = "/llm/trm"


@pytest.fixture
def make_prefixed(make_app):
    return lambda **settings: make_app(root_path=PREFIX, **settings)


@pytest.fixture(params=[PREFIX, ""], ids=["left in place", "taken away"])
def arrives(request):
    """What the proxy leaves of the prefix."""
    return request.param


async def test_every_route_answers(make_prefixed, connect, arrives, chat_body):
    async with connect(make_prefixed()) as client:
        for path in ("/health", "/ready", "/metrics", "/version", "/v1/models", "/v1/models/test/model", *PATHS):
            response = await client.get(f"{arrives}{path}")
            assert response.status_code == 200, (path, response.text)
        assert (await client.post(f"{arrives}/v1/chat/completions", json=chat_body())).status_code == 200
        assert (await client.post(f"{arrives}/solve", json={"question": "1+1?"})).status_code == 200


async def test_a_base_url_without_v1_is_told_the_whole_path(make_prefixed, connect, arrives, chat_body):
    async with connect(make_prefixed()) as client:
        response = await client.post(f"{arrives}/chat/completions", json=chat_body())

    assert f"makes it {PREFIX}/v1/chat/completions is right" in response.json()["error"]["message"]


async def test_a_prefix_of_whoever_runs_the_app_counts_too(make_app):
    """Ray Serve's, say."""
    transport = httpx.ASGITransport(make_app(api_key=["secret"], public_paths=["/"]), root_path=PREFIX)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/", "/health", "/ready"):
            assert (await client.get(f"{PREFIX}{path}")).status_code == 200
        assert (await client.get(f"{PREFIX}/v1/models")).status_code == 401


async def test_what_needs_a_key_and_what_does_not(make_prefixed, connect, arrives):
    app = make_prefixed(api_key=["secret"], public_paths=["/", "/playground/*", "/metrics"])
    async with connect(app) as client:
        for path in ("/health", "/ready", "/metrics", *PATHS):
            assert (await client.get(f"{arrives}{path}")).status_code == 200, path
        for path in ("/version", "/v1/models", "/openapi.json", "/docs"):
            assert (await client.get(f"{arrives}{path}")).status_code == 401, path
            known = await client.get(f"{arrives}{path}", headers={"Authorization": "Bearer secret"})
            assert known.status_code == 200, path


@pytest.mark.parametrize(
    "path",
    [
        f"{PREFIX}{PREFIX}/health",
        f"/{PREFIX}/health",
        f"{PREFIX}//health",
        f"{PREFIX}x/health",
        "//health",
        "/llm/health",
    ],
)
async def test_nothing_but_the_prefix_itself_is_taken_for_it(make_prefixed, connect, path):
    async with connect(make_prefixed(api_key=["secret"])) as client:
        assert (await client.get(f"http://test{path}")).status_code == 401
        known = await client.get(f"http://test{path}", headers={"Authorization": "Bearer secret"})
    assert known.status_code == 404


async def test_the_document_and_its_pages_name_the_prefix(make_prefixed, connect, arrives):
    async with connect(make_prefixed()) as client:
        described = (await client.get(f"{arrives}/openapi.json")).json()
        pages = [(await client.get(f"{arrives}{page}")).text for page in ("/docs", "/redoc")]

    assert described["servers"] == [{"url": PREFIX}]
    assert "/v1/chat/completions" in described["paths"]
    for page in pages:
        assert f"{PREFIX}/openapi.json" in page


async def test_the_page_needs_its_slash(make_prefixed, connect):
    """It asks for its files beside itself."""
    async with connect(make_prefixed()) as client:
        sent_on = await client.get(PREFIX)
        page = await client.get(sent_on.headers["location"])
        kept = await client.get(f"{PREFIX}?theme=dark")

    assert sent_on.status_code == 307
    assert kept.headers["location"] == f"{PREFIX}/?theme=dark"
    assert str(page.url) == f"http://test{PREFIX}/"
    for file in re.findall(r'(?:href|src)="(.*?)"', page.text):
        assert page.url.join(file).path.removeprefix(PREFIX) in PATHS


async def test_the_log_and_the_metrics_say_the_same_as_without_a_prefix(make_prefixed, connect, arrives, caplog):
    caplog.set_level(logging.INFO)

    async with connect(make_prefixed()) as client:
        for path in ("/health", "/metrics", "/", "/v1/models"):
            await client.get(f"{arrives}{path}")
        await client.post(f"{arrives}/nowhere")
        text = (await client.get(f"{arrives}/metrics")).text

    assert [r.path for r in caplog.records if r.name == "server.middleware"] == ["/v1/models", "/nowhere"]
    assert 'trm_request_rejected_total{reason="not_found"} 1.0' in text


@pytest.mark.parametrize(("given", "taken"), [("/trm", "/trm"), ("/a/b/", "/a/b"), ("/", ""), ("", "")])
def test_a_prefix_may_end_in_a_slash(given, taken):
    assert ServeSettings(root_path=given).root_path == taken


@pytest.mark.parametrize("wrong", ["trm", "https://example.org/trm", "/a//b", "/a/../b", "/a b", "/a?b", "/%61"])
def test_what_is_no_prefix_is_named(wrong):
    with pytest.raises(ConfigError, match="--root-path"):
        ServeSettings.create({"root_path": wrong})


@pytest.mark.parametrize("taken", ["/v1", "/health", "/playground"])
async def test_a_prefix_that_our_own_paths_begin_with_is_refused(make_app, taken):
    with pytest.raises(ConfigError, match=f"--root-path {taken}"):
        make_app(root_path=taken)
