"""Several decoders on one backbone over HTTP: chosen by `model`, listed, loaded and unloaded, and by whom."""

import asyncio
import gc
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from server.app import create_app
from server.cli import load_engine
from server.settings import ServeSettings
from tests.conftest import make_backbone, make_model, randomize
from tests.waiting import LIMIT_S, until
from trm import TRMForCausalLM
from trm.checkpoint import fingerprint, read_backbone
from trm.engine import Engine
from trm.errors import CheckpointError, ConfigError
from trm.loading import load_beside

pytestmark = pytest.mark.anyio

KEY = {"Authorization": "Bearer key"}
CHAT = {"messages": [{"role": "user", "content": "1+1"}], "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Checkpoints: `base`, and in `more` those that stand on its backbone, and some that do not."""
    root = tmp_path_factory.mktemp("decoders")
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1}

    def save(path: str, seed: int, *, backbone: int = 0, **shape: Any) -> None:
        model = TRMForCausalLM.from_backbone(make_backbone(seed=backbone, **sizes), n_latent=1, n_cycles=1, **shape)
        randomize(model, scale=1.0, seed=seed).save_pretrained(root / path, tokenizer)

    save("base", 0, n_supervision=2)
    save("more/one", 1, n_supervision=1, max_supervision=3)
    save("more/three", 2, n_supervision=3, normalize_text=False, work=["none"])
    save("later/runs/a/checkpoint-5", 3, n_supervision=4)
    save("later/wide", 4, n_supervision=1, n_layers=2)
    save("later/foreign", 5, backbone=7, n_supervision=1)
    save("later/other-words", 6, n_supervision=1)
    (root / "later/other-words/chat_template.jinja").write_text("{{ messages[0].content }}")
    save("later/padded", 8, n_supervision=1)
    words = Tokenizer.from_file(str(root / "later/padded/tokenizer.json"))
    words.enable_truncation(8)
    words.enable_padding()
    words.save(str(root / "later/padded/tokenizer.json"))
    save("later/other-rope", 7, n_supervision=1)
    for config in (root / "later/other-rope/config.json", root / "later/other-rope/backbone/config.json"):
        config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 100.0'))
    shutil.copytree(root / "more/one", root / "later/broken")
    (root / "later/broken/model.safetensors").write_bytes(b"torn")
    return root


def settings(files: Path, **more: Any) -> ServeSettings:
    return ServeSettings(model=str(files / "base"), served_model_name="base", max_rows=4, max_model_len=200, **more)


@pytest.fixture(scope="module")
def make_engine(files: Path) -> Any:
    """Builds a started engine; keyword arguments are settings. All end with the module."""
    engines: list[Engine] = []

    def make(**more: Any) -> Engine:
        engines.append(load_engine(settings(files, **more)))
        engines[-1].start()
        return engines[-1]

    yield make
    assert all(engine.close() for engine in engines)


@pytest.fixture
async def serve(files: Path, make_engine: Callable[..., Engine]) -> AsyncIterator[Any]:
    """Builds a client of a server with keys that may load what lies in `later`; keyword arguments are settings."""
    clients: list[httpx.AsyncClient] = []

    def build(engine: Engine | None = None, **more: Any) -> httpx.AsyncClient:
        chosen = {"api_key": ["key"], "decoder": [f"one={files}/more/one"], "decoder_dir": files / "later/runs"} | more
        engine = engine or make_engine(**{name: chosen[name] for name in ("decoder", "decoder_dir")})
        transport = httpx.ASGITransport(create_app(engine, settings(files, **chosen)))
        clients.append(httpx.AsyncClient(transport=transport, base_url="http://test", headers=KEY))
        return clients[-1]

    yield build
    for client in clients:
        await client.aclose()


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., Engine], files: Path) -> Engine:
    """With all of `more`."""
    return make_engine(decoder_dir=files / "more")


@pytest.fixture
def client(serve: Any, engine: Engine, files: Path) -> httpx.AsyncClient:
    return serve(engine, decoder=[], decoder_dir=files / "later")  # type: ignore[no-any-return]


async def load(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.post("/v1/decoders/load", json={"name": name})


async def unload(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.post("/v1/decoders/unload", json={"name": name})


def refusal(response: httpx.Response) -> tuple[int, str | None, str | None, str]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"], error["message"]


async def listed(client: httpx.AsyncClient) -> list[str]:
    return [model["id"] for model in (await client.get("/v1/models")).json()["data"]]


# Choosing


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "1+1", "max_tokens": 4, "ignore_eos": True}),
    ],
    ids=["chat", "completions"],
)
async def test_the_model_of_a_request_decodes_it(route, body, client):
    said = {}
    for name, steps in ((None, 2), ("base", 2), ("one", 1), ("three", 3)):
        reply = (await client.post(route, json=body | {"model": name})).json()
        assert reply["model"] == (name or "base")
        assert reply["usage"]["trm"]["supervision_steps_mean"] == steps, "as deep as it was trained"
        said[name] = str(reply["choices"])

    assert said[None] == said["base"]
    assert len(set(said.values())) == 3


async def test_solve_takes_a_model_too(client):
    for name, steps in ((None, 2), ("three", 3)):
        result = (await client.post("/solve", json={"question": "1+1", "max_tokens": 3, "model": name})).json()
        assert result["usage"]["trm"]["supervision_steps_mean"] == steps


async def test_streams_name_the_model_that_speaks(client):
    text = (await client.post("/v1/chat/completions", json=CHAT | {"model": "one", "stream": True})).text

    assert '"model":"one"' in text
    assert '"model":"base"' not in text


async def test_efforts_and_their_limits_are_those_of_the_chosen_model(client):
    async def steps(name: str, **effort: Any) -> float:
        reply = (await client.post("/v1/chat/completions", json=CHAT | effort | {"model": name})).json()
        return float(reply["usage"]["trm"]["supervision_steps_mean"])

    assert [await steps(name, reasoning_effort="max") for name in ("base", "one", "three")] == [4, 2, 6]
    assert await steps("base", supervision_steps=4) == 4
    refused = refusal(await client.post("/v1/chat/completions", json=CHAT | {"model": "one", "supervision_steps": 4}))
    assert refused[:2] == (400, "supervision_steps")
    assert "0 to 3" in refused[3]


async def test_prompts_are_read_as_the_chosen_model_was_trained(client):
    counts = []
    for name in ("base", "three"):  # which was trained without normalising them
        body = {"prompt": "1 \u2212 1", "model": name}
        counts.append((await client.post("/tokenize", json=body)).json()["tokens"])

    assert counts[0] != counts[1]


@pytest.mark.parametrize(
    "route", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/solve", "/tokenize", "/detokenize"]
)
async def test_an_unknown_model_is_refused_with_the_names_that_there_are(route, client):
    body = {
        "/v1/chat/completions": CHAT,
        "/v1/completions": {"prompt": "a"},
        "/v1/responses": {"input": "a"},
        "/solve": {"question": "a"},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [5]},
    }[route]

    refused = refusal(await client.post(route, json=body | {"model": "two"}))

    assert refused[:3] == (404, "model", "model_not_found")
    assert "'two' does not exist; this server has 'base', 'one', 'three'" in refused[3]


async def test_all_are_listed_the_servers_own_first(client):
    models = (await client.get("/v1/models")).json()["data"]

    shape = [(one["id"], one["n_supervision"], one["max_supervision"], one["work"]) for one in models]
    assert shape == [("base", 2, 16, ["full"]), ("one", 1, 3, ["full"]), ("three", 3, 16, ["none"])]
    assert (await client.get("/v1/models/three")).json() == models[2]
    assert (await client.get("/v1/models/two")).status_code == 404


# Loading and unloading


async def test_a_decoder_is_loaded_and_unloaded_while_the_server_runs(serve):
    client = serve()
    name = "a/checkpoint-5"
    assert await listed(client) == ["base", "one"]

    loaded = await load(client, name)

    assert (loaded.status_code, loaded.json()["id"], loaded.json()["n_supervision"]) == (200, name, 4)
    assert await listed(client) == ["base", "one", name]
    assert (await client.get(f"/v1/models/{name}")).json() == loaded.json()
    reply = (await client.post("/v1/chat/completions", json=CHAT | {"model": name})).json()
    assert (reply["model"], reply["usage"]["trm"]["supervision_steps_mean"]) == (name, 4)
    enum = (await client.get("/openapi.json")).json()["components"]["schemas"]["ChatRequest"]["properties"]["model"]
    assert enum["enum"] == ["base", "one", name, None]

    assert (await unload(client, name)).json() == {"id": name, "object": "model", "deleted": True}
    assert await listed(client) == ["base", "one"]
    assert (await client.post("/v1/chat/completions", json=CHAT | {"model": name})).status_code == 404
    enum = (await client.get("/openapi.json")).json()["components"]["schemas"]["ChatRequest"]["properties"]["model"]
    assert enum["enum"] == ["base", "one", None]


async def test_requests_are_counted_by_model_while_it_is_there(serve):
    client, name = serve(), "a/checkpoint-5"

    async def counted(metric: str) -> dict[str, float]:
        families = text_string_to_metric_families((await client.get("/metrics")).text)
        found: Counter[str] = Counter()
        for sample in (sample for family in families for sample in family.samples if sample.name == metric):
            found[sample.labels["model_name"]] += sample.value
        return dict(found)

    assert await counted("trm_request_success_total") == {"base": 0, "one": 0}
    await load(client, name)
    assert await counted("trm_request_success_total") == {"base": 0, "one": 0, name: 0}
    for model in (None, "one", name, name):
        await client.post("/v1/chat/completions", json=CHAT | {"model": model})
    assert await counted("trm_request_success_total") == {"base": 1, "one": 1, name: 2}
    assert await counted("trm_request_generation_tokens_sum") == {"base": 4, "one": 4, name: 8}
    assert await counted("trm_time_to_first_token_seconds_count") == {"base": 1, "one": 1, name: 2}
    await unload(client, name)
    for metric in ("trm_request_success_total", "trm_time_to_first_token_seconds_count"):
        assert await counted(metric) == {"base": 1, "one": 1}


async def test_one_that_was_named_at_the_start_may_come_back(serve):
    client = serve()

    async def said() -> Any:
        reply = (await client.post("/v1/chat/completions", json=CHAT | {"model": "one", "logprobs": True})).json()
        return reply["choices"][0]["message"], [one["token"] for one in reply["choices"][0]["logprobs"]["content"]]

    before = await said()
    assert (await unload(client, "one")).status_code == (await load(client, "one")).status_code == 200

    assert await said() == before


async def test_how_a_tokenizer_file_cuts_and_pads_is_no_other_tokenizer(client):
    assert (await load(client, "padded")).status_code == 200
    assert (await client.post("/v1/chat/completions", json=CHAT | {"model": "padded"})).status_code == 200
    assert (await unload(client, "padded")).status_code == 200


async def test_unloading_waits_for_what_was_accepted_and_takes_nothing_more(serve, make_engine, files, monkeypatch):
    engine = make_engine(decoder=[f"one={files}/more/one"])
    client, going = serve(engine), threading.Event()
    tick, decoder = engine.loop.runner.tick, engine.decoder("one")
    monkeypatch.setattr(engine.loop.runner, "tick", lambda *args: going.wait(LIMIT_S) and tick(*args))
    left = weakref.ref(decoder.model.decoder)
    running = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"model": "one"}))
    async with asyncio.timeout(LIMIT_S):
        while not engine.rows_of(decoder):
            await asyncio.sleep(0.01)

    ending = asyncio.create_task(unload(client, "one"))
    async with asyncio.timeout(LIMIT_S):
        while "one" in await listed(client):
            await asyncio.sleep(0.01)
    refused = await client.post("/v1/chat/completions", json=CHAT | {"model": "one"})
    assert refusal(refused)[:3] == (404, "model", "model_not_found")
    again = refusal(await load(client, "one"))
    assert again[:3] == (400, "name", "decoder_unloading")
    assert "1 of its requests go on" in again[3]
    assert not ending.done()
    going.set()

    assert (await running).json()["model"] == "one"
    assert (await ending).status_code == 200
    del decoder
    for _ in range(100):  # the engine's thread may be leaving its last tick
        gc.collect()
        if left() is None:
            break
        await asyncio.sleep(0.1)
    assert left() is None, "its memory is free"


@pytest.mark.parametrize(
    ("name", "status", "code", "message"),
    [
        ("two", 404, "model_not_found", "no decoder 'two'"),
        ("../more/one", 404, "model_not_found", "no decoder"),
        ("runs/../wide", 404, "model_not_found", "no decoder"),
        ("/etc", 404, "model_not_found", "no decoder"),
        ("one", 400, "model_exists", "'one' is served already; unload it first"),
        ("base", 400, "model_exists", "'base' is served already"),
        ("broken", 400, "decoder_invalid", "broken/model.safetensors: truncated or not safetensors"),
        ("wide", 400, "decoder_invalid", "needs 2 cache entries"),
        ("other-words", 400, "decoder_invalid", "its chat template is not that of the served model"),
        ("other-rope", 400, "decoder_invalid", "rope_parameters of its backbone is {'rope_theta': 100.0"),
    ],
)
async def test_what_cannot_be_loaded_is_named(name, status, code, message, client):
    before = await listed(client)

    refused = refusal(await load(client, name))

    assert refused[:3] == (status, "name", code)
    assert message in refused[3]
    assert await listed(client) == before
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_a_decoder_of_another_backbone_is_refused_by_both_fingerprints(client, engine, files):
    refused = refusal(await load(client, "foreign"))

    assert refused[:3] == (400, "name", "decoder_invalid")
    theirs, ours = (fingerprint(read_backbone(files / name)) for name in ("later/foreign", "base"))
    assert f"trained on a backbone with fingerprint {theirs}, but the served one has {ours}" in refused[3]
    assert engine.model.backbone.identity == ours != theirs


@pytest.mark.parametrize(("name", "status"), [("base", 400), ("two", 404)])
async def test_what_cannot_be_unloaded_is_named(name, status, client):
    refused = refusal(await unload(client, name))

    assert refused[:2] == (status, "name")
    assert f"'{name}'" in refused[3]


async def test_decoders_are_loaded_one_at_a_time(serve, make_engine, files, monkeypatch):
    engine = make_engine(decoder_dir=files / "later/runs")
    client, going = serve(engine, decoder=[]), threading.Event()
    take = engine.load
    monkeypatch.setattr(engine, "load", lambda *args: going.wait(LIMIT_S) and take(*args))
    first = asyncio.create_task(load(client, "a/checkpoint-5"))
    await until(client._transport.app.state.serving.loading.locked)  # type: ignore[attr-defined]

    second = refusal(await load(client, "a/checkpoint-5"))
    going.set()

    assert second[2:] == ("decoder_loading", "another decoder is being loaded; wait until it is")
    assert (await first).status_code == 200


# Who may


@pytest.mark.parametrize("way", ["load", "unload"])
@pytest.mark.parametrize("missing", [{"api_key": []}, {"decoder_dir": None}], ids=["key", "directory"])
async def test_nobody_may_unless_the_operator_gave_keys_and_a_directory(way, missing, serve, engine):
    client = serve(engine, **missing)

    refused = refusal(await client.post(f"/v1/decoders/{way}", json={"name": "one"}))

    assert refused[:3] == (403, None, "decoders_fixed")
    assert "--api-key) and a --decoder-dir" in refused[3]
    assert 'trm_request_rejected_total{reason="forbidden"} 1.0' in (await client.get("/metrics")).text


@pytest.mark.parametrize("headers", [{"Authorization": "Bearer wrong"}, {"Authorization": ""}], ids=["wrong", "none"])
@pytest.mark.parametrize("public", [[], ["/v1/*"], ["/v1/decoders/*"], ["/v1/decoders/load", "/v1/decoders/unload"]])
@pytest.mark.parametrize("way", ["load", "unload"])
async def test_a_key_is_asked_for_whatever_is_public(way, public, headers, serve, engine):
    client = serve(engine, public_paths=public)

    response = await client.post(f"/v1/decoders/{way}", json={"name": "one"}, headers=headers)

    assert refusal(response)[:3] == (401, None, "invalid_api_key")
    assert "one" in await listed(client)


async def test_one_of_several_replicas_stays_like_the_others(engine, files):
    """Ray sends each request to any of them."""
    app = create_app(engine, settings(files, api_key=["key"], decoder_dir=files / "more"), one_of_many=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", headers=KEY) as client:
        assert refusal(await unload(client, "one"))[:3] == (403, None, "decoders_fixed")
        assert await listed(client) == ["base", "one", "three"]


async def test_the_document_tells_of_the_routes_as_they_are(client):
    paths = (await client.get("/openapi.json")).json()["paths"]

    assert {"200", "400", "401", "403", "404"} <= paths["/v1/decoders/load"]["post"]["responses"].keys()
    assert "403" not in paths["/solve"]["post"]["responses"]
    assert "security" not in paths["/v1/decoders/unload"]["post"]


# At the start


def test_decoders_of_the_start_are_named_in_the_log(caplog, files):
    caplog.set_level("INFO")

    load_engine(settings(files, decoder=[f"x/y={files}/more/one"], decoder_dir=files / "more"))

    lines = [record.getMessage() for record in caplog.records if record.name == "server.cli"]
    expected = [("x/y", "more/one"), ("one", "more/one"), ("three", "more/three")]
    assert lines[:-1] == [f"loaded decoder {name} from {files}/{path}" for name, path in expected]


@pytest.mark.parametrize(
    ("name", "message"), [("broken", "truncated or not safetensors"), ("foreign", "with fingerprint .* but the served")]
)
def test_a_decoder_that_cannot_be_served_ends_the_start(name, message, files):
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        load_engine(settings(files, decoder=[f"x={files}/later/{name}"]))


def test_one_that_is_named_at_the_start_widens_the_cache(files):
    narrow, wide = (load_engine(settings(files, decoder=more)) for more in ([], [f"x={files}/later/wide"]))

    assert wide.bytes_per_token == narrow.bytes_per_token * 3 / 2, "one entry for the backbone, and one or two"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder": ["x"]}, "--decoder x: 'x' must be a name .* NAME=DIR"),
        ({"decoder": ["x="]}, "--decoder x=: 'x' must be a name"),
        ({"decoder": ["=x"]}, "--decoder =x: '' must be a name"),
        ({"decoder": ["../x=y"]}, "'../x' must be a name"),
        ({"decoder": ["x=a", "x=b"]}, "--decoder x=b: 'x' is the id of another model too"),
        ({"decoder": ["base=a"]}, "'base' is the id of another model too"),
        ({"decoder_dir": Path("missing")}, "--decoder-dir missing: No such file"),
    ],
)
def test_settings_of_decoders_that_cannot_be_are_refused(fields, message, files):
    with pytest.raises(ConfigError, match=message):
        settings(files, **fields).decoder_sources()


def test_a_folders_name_that_is_no_id_is_refused(tmp_path, files):
    shutil.copytree(files / "more/one", tmp_path / "my decoder")
    shutil.copytree(files / "more/one", tmp_path / ".one.partial")
    (tmp_path / "empty").mkdir()

    with pytest.raises(ConfigError, match="'my decoder' must be a name"):
        settings(files, decoder_dir=tmp_path).decoder_sources()

    shutil.rmtree(tmp_path / "my decoder")
    assert settings(files, decoder_dir=tmp_path).decoder_sources() == {}


def test_a_decoder_with_the_models_own_head_and_without_share_a_backbone(tmp_path, tokenizer):
    """The backbone's head is left out only where nobody reads it."""
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1}
    for name, own in (("base", True), ("plain", False)):
        make_model(sizes=sizes, own_lm_head=own, n_supervision=1).save_pretrained(tmp_path / name, tokenizer)
    both = load_engine(settings(tmp_path, decoder=[f"plain={tmp_path}/plain"]))
    alone = load_engine(settings(tmp_path))

    assert both.decoder("plain").model.head is both.model.backbone.lm_head
    with pytest.raises(CheckpointError, match="needs the backbone's head, which was left out"):
        load_beside(tmp_path / "plain", alone.model, alone.chat)
