"""A minute of the soak, as a person runs it."""

import json
from pathlib import Path

from tests.e2e.conftest import run_command

MAX_GROWTH = 0.05  # a minute is little more than the warm-up


def test_a_minute_of_mixed_traffic_leaves_nothing_behind(tmp_path: Path) -> None:
    arguments = ["--minutes", "1", "--max-rows", "16", "--num-threads", "1", "--max-growth", str(MAX_GROWTH)]

    done = run_command("trm-bench", "soak", *arguments, "--report", str(tmp_path))

    assert done.returncode == 0, done.stderr + "\n".join(done.stdout.splitlines()[:-1])
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert all(check["holds"] for check in report["checks"])
    assert len(report["samples"]) > 100
    assert report["growth"]["own_mb"]["high"] < MAX_GROWTH
    assert set(report["refusals"]) >= {"invalid", "overloaded"}
    answered = {kind for kind, counts in report["outcomes"].items() if counts.get("answered")}
    assert answered >= {"chat", "long prompt", "several samples", "solve by votes", "grammar", "slow reader", "canary"}
