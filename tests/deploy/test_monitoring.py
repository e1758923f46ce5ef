"""Prometheus' configuration and rules, Grafana's dashboard, and the runbook, against each other and the metrics."""

import re
import subprocess
from collections import Counter

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.settings import ServeSettings
from tests.deploy.dockerfiles import DEPLOY, ROOT
from tests.deploy.monitoring import ALERTS, DASHBOARD, PANELS, QUERIES, metric_names, prometheus_tool
from tests.server.conftest import FakeEngine

RUNBOOK = (DEPLOY / "runbook.md").read_text()


@pytest.mark.parametrize(
    "words",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_finds_nothing(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [prometheus_tool("promtool"), *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_servers_have_one_job_wherever_they_run() -> None:
    """Compose's Prometheus names it; a ServiceMonitor calls it as the Service; alerts and dashboard ask for it."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    service = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "service.yaml").read_text())
    asked = re.findall(r'job="(.*?)"', " ".join([*QUERIES, *(alert["expr"] for alert in ALERTS)]))

    assert set(asked) == {service["metadata"]["name"]}
    assert service["metadata"]["name"] in {job["job_name"] for job in config["scrape_configs"]}


def test_every_alert_is_shown_firing_before_its_time_and_silent() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    shown = Counter((case["alertname"], bool(case["exp_alerts"])) for case in cases)

    for alert in ALERTS:
        assert shown[alert["alert"], True] == 1
        assert shown[alert["alert"], False] == 2


def test_every_alert_tells_how_bad_it_is_and_where_to_read_on() -> None:
    sections = re.findall(r"^### (.*)$", RUNBOOK, re.MULTILINE)

    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["runbook_url"] == f"deploy/runbook.md#{alert['alert'].lower()}"
        assert alert["alert"] in sections
    assert {name for name in sections if name.startswith("Trm")} == {alert["alert"] for alert in ALERTS}


def test_every_metric_that_is_asked_for_exists() -> None:
    app = create_app(FakeEngine(), ServeSettings())
    families = text_string_to_metric_families(app.state.metrics.exposition().decode())
    known = {sample.name for family in families for sample in family.samples}
    series = known | {family.removesuffix("_bucket") for family in known}

    assert metric_names(" ".join(QUERIES)) <= known
    assert metric_names(" ".join(alert["expr"] for alert in ALERTS)) <= known
    assert metric_names(RUNBOOK) <= series
    assert metric_names((DEPLOY / "README.md").read_text()) <= series
    assert metric_names((ROOT / "docs" / "serving.md").read_text()) <= series


def test_every_panel_asks_for_something_in_a_unit_and_covers_no_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["targets"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert 'instance=~"$instance"' in target["expr"], panel["title"]
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_the_dashboard_uses_the_variables_that_it_has() -> None:
    used = set(re.findall(r"\$\{?(\w+)", str(PANELS))) - {"__rate_interval"}

    assert used == {variable["name"] for variable in DASHBOARD["templating"]["list"]}
