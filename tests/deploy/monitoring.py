"""What Prometheus and Grafana are given, as data."""

import json
import re
import shutil
from typing import Any

import yaml

from tests.deploy.dockerfiles import DEPLOY

DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "qwen-trm.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]


def metric_names(text: str) -> set[str]:
    """Names of our own metrics and of the process's in a text."""
    return set(re.findall(r"\b(?:trm|process)_\w+", text))


def prometheus_tool(name: str) -> str:
    """Where a program of Debian's package prometheus lies; a machine without it fails the test."""
    found = shutil.which(name)
    assert found, f"{name} is missing; install Debian's package prometheus"
    return found
