"""Routes for operators and the list of models."""

import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from trm.engine.request import Event, Usage
from trm.errors import DeviceError

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent.parent


async def samples(client):
    """Every sample of /metrics by name and labels, summed over models."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    found = Counter()
    for sample in (sample for family in families for sample in family.samples):
        labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
        found[sample.name, *labels.values()] += sample.value
    return found


async def test_alive_and_ready(client):
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).json() == {"status": "ready"}


async def test_a_dead_engine_is_neither_alive_nor_ready_and_takes_no_work(client, engine):
    engine.dead = True

    for response in (
        await client.get("/health"),
        await client.get("/ready"),
        await client.post("/solve", json={"question": "a"}),
    ):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "device_failed"


async def test_a_draining_server_is_alive_but_takes_no_work(client, app):
    await app.state.serving.worker.drain(1)

    assert (await client.get("/health")).status_code == 200
    for response in (await client.get("/ready"), await client.post("/solve", json={"question": "a"})):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "draining"


async def test_version(client):
    expected = {
        "version": version("qwen-trm"),
        "model": "test/model",
        "torch": version("torch"),
        "dtype": "float32",
        "quantize": None,
        "exact": False,
    }

    assert (await client.get("/version")).json() == expected


async def test_models(client):
    listed = (await client.get("/v1/models")).json()
    (model,) = listed["data"]

    assert listed["object"] == "list"
    assert model.pop("created") > 0
    assert model == {
        "id": "test/model",
        "object": "model",
        "owned_by": "qwen-trm",
        "max_model_len": 400,
        "n_supervision": 4,
        "max_supervision": 16,
        "work": ["full"],
    }
    for path in ("/v1/models/test/model", "/v1/models/test%2Fmodel"):
        assert (await client.get(path)).json()["id"] == "test/model"


async def test_the_engines_numbers_are_read_at_each_scrape(client):
    found = await samples(client)

    assert {
        ("trm_num_requests_running",): 1,
        ("trm_num_requests_waiting",): 2,
        ("trm_kv_cache_usage_ratio",): 0.25,
        ("trm_kv_cache_bytes",): 1000,
        ("trm_kv_cache_bytes_per_token",): 10,
        ("trm_engine_steps_total",): 33,
        ("trm_row_places_total",): 44,
        ("trm_ticks_total",): 55,
        ("trm_row_steps_total",): 66,
        ("trm_backbone_calls_total",): 77,
        ("trm_prompt_tokens_total",): 88,
        ("trm_cached_prompt_tokens_total",): 99,
        ("trm_generation_tokens_total",): 111,
        ("trm_draft_tokens_total",): 122,
        ("trm_accepted_tokens_total",): 133,
        ("trm_max_rows",): 4,
        ("trm_max_queue",): 8,
    }.items() <= found.items()


async def test_labels_are_there_before_their_first_count(client):
    found = await samples(client)

    for name, label in (
        ("trm_request_success_total", "cancelled"),
        ("trm_request_rejected_total", "overloaded"),
        ("trm_solve_answers_total", "missing"),
    ):
        assert found[name, label] == 0


async def test_the_metrics_know_of_a_server_that_starts_serves_drains_and_fails(app, client, connect, engine):
    async def state(client):
        found = await samples(client)
        return found[("trm_alive",)], found[("trm_ready",)]

    async with connect(create_app(None, app.state.settings)) as starting:
        assert await state(starting) == (1, 0)
    assert await state(client) == (1, 1)
    await app.state.serving.worker.drain(1)
    assert await state(client) == (1, 0)
    engine.dead = True
    assert await state(client) == (0, 0)


async def test_the_process_is_measured(client):
    found = await samples(client)

    assert found[("process_resident_memory_bytes",)] > 2**20
    assert found[("process_open_fds",)] > 0
    assert found[("process_cpu_seconds_total",)] > 0


async def test_replies_are_counted_and_timed(client, engine, say):
    before = await samples(client)
    assert not any(name.endswith("_count") and value for (name, *_), value in before.items())
    await client.post("/solve", json={"question": ["a", "b"], "n": 2})
    engine.script = say("no box", finish="length")
    await client.post("/solve", json={"question": "a"})

    after = await samples(client)

    assert after["trm_request_success_total", "stop"] == 4
    assert after["trm_request_success_total", "length"] == 1
    assert after["trm_solve_answers_total", "boxed"] == 2
    assert after["trm_solve_answers_total", "truncated"] == 1
    assert after[("trm_time_to_first_token_seconds_count",)] == 5
    assert after[("trm_inter_token_latency_seconds_count",)] == 4 * 2 + 1
    assert after[("trm_e2e_request_latency_seconds_count",)] == 5
    assert after[("trm_supervision_steps_per_token_count",)] == 5
    assert after[("trm_supervision_steps_per_token_sum",)] == 5 * 4


async def test_tokens_that_come_together_are_one_gap_and_share_it_in_the_mean(client, engine):
    engine.script = lambda request: [Event((1,), "a"), Event((2, 3, 4), "bcd", "length", Usage(3, 4, 6, queue_s=2.0))]
    await client.post("/solve", json={"question": "a"})

    after = await samples(client)

    assert after[("trm_inter_token_latency_seconds_count",)] == 1
    gap_s = after[("trm_inter_token_latency_seconds_sum",)]
    assert after[("trm_request_time_per_output_token_seconds_sum",)] == pytest.approx(gap_s / 3)
    assert after[("trm_request_queue_time_seconds_sum",)] == 2.0
    assert after[("trm_supervision_steps_per_token_sum",)] == 1.5


async def test_a_reply_that_was_cut_short_has_no_steps_per_token(client, engine):
    engine.script = lambda request: [Event((1,), "a"), Event((), "", "error", Usage(3, 1, 4), DeviceError("broken"))]
    await client.post("/solve", json={"question": "a"})

    after = await samples(client)

    assert after["trm_request_success_total", "error"] == 1
    assert after[("trm_supervision_steps_per_token_count",)] == 0


async def test_apps_do_not_share_their_counts(client, make_app, connect):
    await client.post("/solve", json={"question": "a"})

    async with connect(make_app()) as other:
        assert (await samples(other))["trm_request_success_total", "stop"] == 0


async def test_the_docs_tell_of_every_metric(client):
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    shown = {family.name for family in families if not family.name.endswith("_created")}

    told = set(re.findall(r"`((?:trm|process)_\w+)", (ROOT / "docs/serving.md").read_text()))

    assert {name.removesuffix("_total") for name in told} == shown
