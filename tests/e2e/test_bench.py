"""`trm-bench` as a person runs it: a table, then one line of JSON whose ratios follow from its raw numbers."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

pytestmark = pytest.mark.slow

REQUESTS = 4


def trm_bench(*arguments: str) -> list[str]:
    """The lines that it prints."""
    command = [str(Path(sys.executable).parent / "trm-bench"), *arguments]
    sizes = ["--num-requests", str(REQUESTS), "--max-rows", "2", "--num-threads", "1"]
    done = subprocess.run(command + sizes, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return trm_bench("decode", "--repeats", "1", "--full")


@pytest.fixture(scope="module")
def result(lines: list[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(lines[-1])
    return parsed


def test_every_ratio_follows_from_the_raw_counts_and_times(result: dict[str, Any]) -> None:
    raw = result["raw"]
    throughput, mixed, halting, overhead = (raw[k] for k in ("throughput", "mixed_effort", "halting", "overhead"))
    single, many = raw["speculation_1_row"], raw["speculation_all_rows"]
    chosen = next(row for row in halting["table"] if row["tolerance"] == halting["chosen"]["tolerance"])

    expected = {
        "continuous_vs_sequential": median(throughput["sequential_s"]) / median(throughput["engine_s"]),
        "continuous_vs_static": median(throughput["static_s"]) / median(throughput["engine_s"]),
        "mixed_effort_vs_lockstep": median(mixed["lockstep_s"]) / median(mixed["continuous_s"]),
        "mixed_effort_vs_waiting": median(mixed["waiting_s"]) / median(mixed["continuous_s"]),
        "mixed_effort_vs_grouped": median(mixed["grouped_s"]) / median(mixed["continuous_s"]),
        "ideal_row_steps": mixed["continuous"]["row_steps"] / mixed["continuous"]["row_places"],
        "speculation_1_row": median(single["without_s"]) / median(single["with_s"]),
        "speculation_32_rows": median(many["without_s"]) / median(many["with_s"]),
        "halting_speedup": median(halting["full_s"]) / median(halting["halted_s"]),
        "halting_agreement": chosen["agreeing"] / chosen["positions"],
        "overhead_share_32_rows": (sum(overhead["total_s"]) - sum(overhead["model_s"])) / sum(overhead["total_s"]),
    }

    assert {name: result[name] for name in expected} == pytest.approx(expected)


def test_all_ways_decode_the_same(result: dict[str, Any]) -> None:
    raw = result["raw"]
    equal = [
        raw["throughput"]["requests_equal_to_sequential"],
        raw["throughput"]["static_requests_equal_to_sequential"],
        raw["speculation_1_row"]["requests_equal"],
        raw["speculation_all_rows"]["requests_equal"],
    ]
    assert equal == [REQUESTS] * len(equal)
    assert raw["mixed_effort"]["requests_equal"] == raw["mixed_effort"]["requests"]


def test_counters_add_up(result: dict[str, Any]) -> None:
    raw = result["raw"]
    mixed, single = raw["mixed_effort"], raw["speculation_1_row"]
    assert single["with"]["generation_tokens"] == single["without"]["generation_tokens"] > 0
    assert mixed["continuous"]["row_steps"] == mixed["waiting"]["row_steps"] < mixed["lockstep"]["row_steps"]
    for counters in (mixed["continuous"], mixed["waiting"], mixed["lockstep"], single["with"]):
        assert counters["row_steps"] <= counters["row_places"]
        assert counters["accepted_tokens"] <= counters["draft_tokens"]
    assert raw["speculation_1_row"]["without"]["draft_tokens"] == 0
    for row in raw["halting"]["table"]:
        assert row["positions"] <= row["steps"] <= 16 * row["positions"]
    steps = [row["steps"] for row in raw["halting"]["table"]]
    assert steps == sorted(steps, reverse=True), "a looser tolerance never takes more steps"
    assert raw["overhead"]["model_s"][0] < raw["overhead"]["total_s"][0]


def test_table_and_curves_come_before_the_json(lines: list[str], result: dict[str, Any]) -> None:
    text = "\n".join(lines[:-1])

    assert f"{result['continuous_vs_static']:.2f}" in text
    assert "keys from the state" in text
    assert set(result["raw"]["context_curve"]) == {"context", "state"}
    for curve in result["raw"]["context_curve"].values():
        assert list(curve["seconds"]) == ["64", "128", "256", "512", "1024", "2048"]


def test_the_server_decodes_what_the_bare_engine_does() -> None:
    *table, last = trm_bench("serve", "--repeats", "2")
    result = json.loads(last)
    raw = result["raw"]

    assert raw["requests_equal"] == REQUESTS
    assert raw["tokens_over_http"] == raw["tokens"] > 8 * REQUESTS
    assert len(raw["first_token_s"]) == 2 * REQUESTS
    assert len(raw["gaps_s"]) <= 2 * raw["tokens"]
    assert result["http_vs_engine"] == pytest.approx(median(raw["engine_wall_s"]) / median(raw["http_wall_s"]))
    assert result["server_cpu_vs_engine"] == pytest.approx(median(raw["server_cpu_s"]) / median(raw["engine_cpu_s"]))
    assert 0 < result["inter_token_p50_s"] <= result["inter_token_p95_s"] < max(raw["http_wall_s"])
    assert 0 < result["first_token_p50_s"] <= result["first_token_p95_s"] < max(raw["http_wall_s"])
    assert 0 < result["clients_cpu_share"] < result["server_cpu_share"]
    assert f"{result['http_vs_engine']:.3f}" in "\n".join(table)
