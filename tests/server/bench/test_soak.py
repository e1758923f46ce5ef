"""The judgement of a soak and its report, on a run that never was."""

import json
import random

import pytest

from server.bench.soak import report as soak_report
from server.bench.soak import run as soak
from server.bench.soak.growth import Growth
from server.bench.soak.traffic import Draw, Record

KINDS = set(Draw(random.Random(0), 1024, 16).kinds)
FLAT = Growth(100.0, 0.0, -0.001, 0.001)
GROWN = {"own_mb": FLAT, "descriptors": FLAT, "threads": FLAT, "rss_mb": FLAT, "uss_mb": FLAT}
IDLE = {"running": 0, "waiting": 0, "cache_usage": 0.0, "descriptors": 14, "threads": 10}
MEMORY = {"own_mb": 370.0, "uss_mb": 400.0, "rss_mb": 500.0, "malloc_mb": 250.0, "python_blocks": 1_700_000}


def sample(at):
    return (
        IDLE
        | MEMORY
        | {
            "at": at,
            "cores": 1.0,
            "cores_of_clients": 0.1,
            "cores_of_others": 0.5,
            "connections": 40,
            "generation_tokens": int(10 * at),
        }
    )


def record(kind="chat", outcome="answered", at=1.0, why=""):
    return Record(kind, outcome, why, at, 0.5, 0.25)


RECORDS = [record(kind, at=at) for kind in sorted(KINDS) for at in (1.0, 30.0, 59.0)] + [
    record(outcome="refused", why="overloaded"),
    record(outcome="left"),
]


def report(**changed):
    return {
        "minutes": 1.0,
        "server": ["--max-rows=2"],
        "max_growth": 0.02,
        "outcomes": soak.outcomes(RECORDS),
        "failures": [],
        "refusals": soak.refusals(RECORDS),
        "rejected": {"overloaded": 1},
        "tokens": 600,
        "canaries": {"asked": 3, "near_ties": 0, "broken": []},
        "before": IDLE | MEMORY,
        "after": IDLE | MEMORY,
        "growth": {name: vars(one) for name, one in GROWN.items()},
        "exit_status": 0,
        "log_troubles": [],
        "latency": soak.latencies(RECORDS, 60),
        "over_time": soak.over_time(RECORDS, 60),
        "samples": [sample(float(at)) for at in range(60)],
        "max_rows": 2,
        "threads": 1,
        "seed": 0,
        "machine": "a machine",
        "torch": "2",
    } | changed


def broken(told, grown=GROWN, departures=1):
    return [row["check"] for row in soak.checks(told, grown, 1, departures, KINDS) if not row["holds"]]


def test_a_run_without_fault_passes_every_check():
    assert broken(report()) == []


@pytest.mark.parametrize(
    ("changed", "check"),
    [
        ({"outcomes": soak.outcomes([*RECORDS, record(outcome="failed")])}, "every request is accounted for"),
        (
            {"outcomes": soak.outcomes([one for one in RECORDS if one.kind != "solve"])},
            "every kind of client was there",
        ),
        ({"refusals": {}, "rejected": {}}, "a full queue refused some"),
        ({"rejected": {"overloaded": 3}}, "the server's books agree with ours"),
        ({"rejected": {"overloaded": 1, "failed": 1}}, "the server's books agree with ours"),
        ({"canaries": {"asked": 3, "near_ties": 0, "broken": [{}]}}, "canaries sing as they did alone"),
        ({"canaries": {"asked": 0, "near_ties": 0, "broken": []}}, "canaries sing as they did alone"),
        ({"after": IDLE | MEMORY | {"running": 1}}, "no row, no queue and no reserved cache is left"),
        ({"after": IDLE | MEMORY | {"cache_usage": 0.1}}, "no row, no queue and no reserved cache is left"),
        ({"after": IDLE | MEMORY | {"descriptors": 15}}, "no descriptor is left"),
        ({"after": IDLE | MEMORY | {"malloc_mb": 255.1}}, "at rest, malloc has handed out less than 2% more"),
        (
            {"after": IDLE | MEMORY | {"python_blocks": 1_735_000}},
            "at rest, Python's objects hold less than 2% more",
        ),
        ({"log_troubles": ["Traceback"]}, "nothing of note is in the log"),
        ({"exit_status": -9}, "SIGTERM ends it with status 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_each_fault_breaks_its_check(changed, check):
    assert broken(report(**changed)) == [check]


def test_growth_and_uncounted_departures_break_theirs():
    grown = GROWN | {"own_mb": Growth(100.0, 0.015, 0.005, 0.025)}

    assert broken(report(), grown) == ["memory of its own grew by less than 2%"]
    assert (
        broken(report(), departures=0)
        == broken(report(), departures=2)
        == ["the server saw clients leave, no more than left"]
    )


def test_memory_that_is_shared_with_others_may_change_hands():
    """Private memory was 10 % higher once another process of the same libraries had gone; its own was not."""
    told = report(samples=[sample(float(at)) | {"uss_mb": 400.0 if at < 30 else 440.0} for at in range(60)])
    grown = {name: soak.growth_of(told["samples"], name, 60) for name in GROWN}
    told |= {
        "growth": {name: vars(one) for name, one in grown.items()},
        "checks": soak.checks(told, grown, 1, 1, KINDS),
    }

    assert broken(told, grown) == []
    assert grown["uss_mb"].low > 0.05
    (row,) = [line for line in soak_report.table(told).splitlines() if line.startswith("| private memory")]
    assert "| not judged | +" in row
    assert row.endswith("; 30 to 70 MB of files |")


def test_growth_is_judged_after_the_warm_up_and_while_there_is_traffic():
    samples = [sample(float(at)) | {"threads": 4 if at < 12 else 10 if at <= 60 else 50} for at in range(90)]

    grown = soak.growth_of(samples, "threads", 60)

    assert (grown.level, grown.share, grown.high) == pytest.approx((10, 0, 0))


def test_refusals_are_read_from_the_metrics():
    metrics = {'trm_request_rejected_total{reason="invalid"}': 2.0, "trm_request_rejected_created": 1e9}

    assert soak.rejected(metrics) == {"invalid": 2}


def test_the_report_tells_of_every_check_and_failure(tmp_path):
    told = report(failures=[vars(record(outcome="failed", why="status 500"))], log_troubles=["a warning"])
    told["checks"] = soak.checks(told, GROWN, 1, 1, KINDS)

    soak_report.write(tmp_path / "new" / "directory", told)

    directory = tmp_path / "new" / "directory"
    page = (directory / "README.md").read_text()
    assert all(row["check"] in page for row in told["checks"])
    assert "| nothing of note is in the log | **NO** | 1 lines |" in page
    assert "- `chat: status 500`" in page
    assert "- `a warning`" in page
    assert json.loads((directory / "report.json").read_text()) == told
    pictures = {path.name for path in directory.glob("*.png")}
    assert pictures == {f"{name}.png" for name in soak_report.PICTURES}
    assert all(f"({name})" in page for name in pictures)
    assert all((directory / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
