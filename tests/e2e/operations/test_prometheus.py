"""A real Prometheus with deploy/'s rules scrapes a real server under a small load."""

import math
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.dockerfiles import DEPLOY, ROOT
from tests.deploy.monitoring import ALERTS, PANELS, metric_names, prometheus_tool
from tests.e2e.conftest import ServerProcess

QUESTION = "Tom has 12 apples. He buys 7 more. How many apples does he have now?"
CHAT = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48, "supervision_steps": 2}
ROWS, QUEUE = 4, 4


class Prometheus:
    """Debian's, with the configuration of deploy/, but for addresses and a faster pace."""

    def __init__(self, target: str, folder: Path) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
        config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] == "qwen-trm"]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.create_server(("127.0.0.1", 0)) as sock:
            address = f"127.0.0.1:{sock.getsockname()[1]}"
        self.url = f"http://{address}/api/v1"
        self.log = folder / "log.txt"
        flags = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder, "web.listen-address": address}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [prometheus_tool("prometheus"), *(f"--{name}={value}" for name, value in flags.items())],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/{path}", params=params, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, query: str) -> list[float]:
        return [float(sample["value"][1]) for sample in self.get("query", query=query)["result"]]

    def wait_for(self, query: str) -> None:
        """Until it has a result."""
        self.wait_until(lambda: bool(self.values(query)), query)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            if condition():
                return
            time.sleep(0.2)
        raise AssertionError(f"waited in vain for {what}\n{self.log.read_text()[-3000:]}")

    def ready(self) -> bool:
        try:
            return httpx.get(self.url.replace("api/v1", "-/ready"), timeout=10).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    return start_server("--max-rows", str(ROWS), "--max-queue", str(QUEUE), "--num-threads", "1")


@pytest.fixture(scope="module")
def prometheus(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped the server before, during and after the load."""
    prometheus = Prometheus(server.url.removeprefix("http://"), tmp_path_factory.mktemp("prometheus"))
    try:
        prometheus.wait_until(prometheus.ready, "Prometheus")
        prometheus.wait_for("count_over_time(trm_ready[1m]) > 1")
        load(server.url)
        prometheus.wait_for("trm_client_disconnects_total > 0")
        done = prometheus.values("timestamp(trm_ready)")[0]
        prometheus.wait_for(f"timestamp(trm_ready) > {done}")
        yield prometheus
    finally:
        prometheus.process.terminate()
        prometheus.process.wait(timeout=30)


def load(url: str) -> None:
    """A little of everything: streams, votes, a request refused, one too many, and a client that leaves."""
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(3):
            with client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as reply:
                assert reply.read().endswith(b"data: [DONE]\n\n")
        solved = client.post("/solve", json={"question": [QUESTION, QUESTION], "n": 3, "supervision_steps": 2})
        assert solved.status_code == 200
        assert client.post("/v1/chat/completions", json=CHAT | {"temprature": 1}).status_code == 400
        long = CHAT | {"stream": True, "ignore_eos": True, "max_tokens": 3000, "supervision_steps": 16}
        with client.stream("POST", "/v1/chat/completions", json=long) as reply:
            next(reply.iter_lines())
            assert client.post("/solve", json={"question": QUESTION, "n": ROWS + QUEUE}).status_code == 429


def test_every_metric_of_the_docs_is_scraped(prometheus: Prometheus) -> None:
    told = metric_names((ROOT / "docs" / "serving.md").read_text())
    scraped = set(prometheus.get("label/__name__/values"))

    assert told
    assert {name for name in told if not {name, f"{name}_bucket"} & scraped} == set()


def test_promtool_has_nothing_to_say_about_the_metrics(server: ServerProcess) -> None:
    text = httpx.get(f"{server.url}/metrics").text

    done = subprocess.run([prometheus_tool("promtool"), "check", "metrics"], input=text, capture_output=True, text=True)

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_the_dashboard_shows_the_load(prometheus: Prometheus, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")
        found = prometheus.values(query)
        assert found, query
        assert all(map(math.isfinite, found)), query


def test_the_numbers_are_those_of_the_load(prometheus: Prometheus) -> None:
    def total(query: str) -> float:
        return sum(prometheus.values(query))

    assert total('trm_request_success_total{finished_reason=~"stop|length"}') == 3 + 2 * 3
    assert total('trm_request_success_total{finished_reason="cancelled"}') == 1
    assert total("trm_solve_answers_total") == 2
    assert total('trm_request_rejected_total{reason="invalid"}') == 1
    assert total('trm_request_rejected_total{reason="overloaded"}') == 1
    assert total("trm_client_disconnects_total") == 1
    assert total("trm_max_rows") == ROWS
    assert total("trm_draft_tokens_total") > 0


def test_prometheus_evaluates_every_rule(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    prometheus.wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), "the rules")

    assert {rule["name"]: rule["health"] for rule in rules()} == {alert["alert"]: "ok" for alert in ALERTS}
    assert {rule["name"] for rule in rules() if rule["state"] == "firing"} == set()
