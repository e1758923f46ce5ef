"""Replicas under Ray Serve, deployed by the configuration of the RayService: one is killed while all have work."""

import asyncio
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.e2e.conftest import clean_environment
from tests.waiting import ask_and_leave

DEPLOY = Path(__file__).parents[3] / "deploy"
WAIT_S = 120
KEY = "cluster-key"
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
MAX_ROWS = 6
STREAMS = 4
QUESTIONS = [
    "Tom has 12 apples. He buys 7 more. How many apples does he have now?",
    "Ann has 9 eggs and eats 4. How many are left?",
    "Lily has 15 books. She buys 6 more. How many books does she have now?",
]
LAUNCH = """
import signal, sys
import ray
from ray.serve.scripts import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
ray.init(num_cpus=2, include_dashboard=False, namespace="serve", _temp_dir=sys.argv[1], _node_ip_address="127.0.0.1")
cli(["run", sys.argv[2]])
"""


class RayProcess:
    """`serve run` on a Ray of its own: no dashboard, two CPUs, everything below one folder with a short name."""

    def __init__(self, config: dict[str, Any], folder: Path, log: Path) -> None:
        self.log = log
        self.url = f"http://127.0.0.1:{config['http_options']['port']}"
        path = folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        environment = {"PYTHONPATH": str(DEPLOY), "OMP_NUM_THREADS": "1", "TRM_API_KEY": KEY}
        environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(folder), str(path)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=clean_environment() | environment,
            )

    def decoders(self) -> list[psutil.Process]:
        """The processes that decode; all descend from this one."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if re.match(r"ray::ServeReplica:.*:Decoder", " ".join(process.cmdline())):
                    found.append(process)
            except psutil.Error:
                continue  # gone meanwhile
        return found

    def metric(self, name: str) -> dict[str, float]:
        """Its sum for each replica."""
        sums: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics", headers=AUTHORIZATION, timeout=30).text.splitlines():
            if re.match(rf"{name}{{", line):
                replica = re.search(r'replica="(\w+)"', line)
                assert replica, line
                sums[replica[1]] = sums.get(replica[1], 0) + float(line.split()[-1])
        return sums

    def replicas(self) -> set[str]:
        return set(self.metric("trm_ticks_total"))

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self.process.poll() is None, f"ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"never {what}:\n{self.log.read_text()[-20_000:]}"
            time.sleep(0.1)

    def stop(self) -> None:
        """Ctrl-C, as a user; what outlives that is ended by its id."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=30)
        finally:
            self.process.kill()
            _, alive = psutil.wait_procs(family, timeout=10)
            for process in alive:
                process.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayProcess]:
    manifest = yaml.safe_load((DEPLOY / "kubernetes" / "rayservice.yaml").read_text())
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config["http_options"] = {"host": "127.0.0.1", "port": sock.getsockname()[1]}
    (application,) = config["applications"]
    application["args"] |= {"max_rows": MAX_ROWS, "max_model_len": 512, "num_threads": 1}
    entrance, decoder = application["deployments"]
    entrance["num_replicas"] = 1
    decoder["autoscaling_config"] = {"min_replicas": 2, "max_replicas": 2, "target_ongoing_requests": MAX_ROWS}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        ray = RayProcess(config, Path(folder), tmp_path_factory.mktemp("ray") / "log.txt")
        try:
            ray.wait(ray.is_ready, "ready")
            ray.wait(lambda: len(ray.replicas()) == 2, "two replicas")
            yield ray
        finally:
            ray.stop()


def chat(question: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": 60, "supervision_steps": 8, **fields}


def long_chat(stream: bool) -> dict[str, Any]:
    return chat(QUESTIONS[0], stream=stream, max_tokens=400, ignore_eos=True, supervision_steps=1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_decoder_that_dies_costs_no_reply_and_ends_its_streams_with_an_error(cluster: RayProcess) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=cluster.url, headers=AUTHORIZATION, timeout=120, limits=limits) as client:

        async def ask(index: int) -> httpx.Response:
            index %= len(QUESTIONS)  # different efforts, or all would end at once and nothing were under way
            body = chat(QUESTIONS[index], supervision_steps=4 + 2 * index)
            return await client.post("/v1/chat/completions", json=body)

        async def stream(begun: asyncio.Event) -> list[str]:
            async with client.stream("POST", "/v1/chat/completions", json=long_chat(stream=True)) as response:
                assert response.status_code == 200
                events = []
                async for line in response.aiter_lines():
                    begun.set()
                    events.append(line.removeprefix("data: "))
                return [event for event in events if event]

        alone = [(await ask(index)).json()["choices"][0]["message"] for index in range(len(QUESTIONS))]
        before = cluster.replicas()
        begun = [asyncio.Event() for _ in range(STREAMS)]
        streams = [asyncio.create_task(stream(event)) for event in begun]
        await asyncio.gather(*(event.wait() for event in begun))
        asked = [asyncio.create_task(ask(index)) for index in range(40)]
        for answered in itertools.islice(asyncio.as_completed(asked), 10):
            await answered
        victim = cluster.decoders()[0]
        unfinished = sum(not task.done() for task in (*asked, *streams))

        victim.kill()

        replies, told = await asyncio.gather(*asked), await asyncio.gather(*streams)

    assert unfinished > 2 * MAX_ROWS, "some decoder had nothing to do when it was killed: this proves nothing"
    assert [reply.status_code for reply in replies] == [200] * len(replies)
    messages = [reply.json()["choices"][0]["message"] for reply in replies]
    assert messages == [alone[index % len(QUESTIONS)] for index in range(len(replies))]
    lost = 0
    for events in told:
        assert events[-1] == "[DONE]"
        last = json.loads(events[-2])
        if "error" in last:
            assert last["error"]["code"] == "replica_lost"
            lost += 1
        else:
            assert last["choices"][0]["finish_reason"] == "length"
    cluster.wait(lambda: len(cluster.replicas() - before) == 1, "replaced")
    assert len(cluster.decoders()) == 2
    deaths = cluster.log.read_text().count("its replica died")
    print(f"{unfinished} requests were unfinished, {deaths} had their decoder die, {lost} of them streams")
    assert deaths > lost, "no reply had to be asked for again"


def test_a_client_that_leaves_frees_its_rows(cluster: RayProcess) -> None:
    def total(name: str) -> float:
        return sum(cluster.metric(name).values())

    url, departed = f"{cluster.url}/v1/chat/completions", total("trm_client_disconnects_total")
    with httpx.stream("POST", url, json=long_chat(stream=True), headers=AUTHORIZATION, timeout=60) as response:
        lines = response.iter_lines()  # the connection lives as long as this does
        next(lines)
    cluster.wait(lambda: total("trm_num_requests_running") == 0, "let the first one go")
    ask_and_leave(url, long_chat(stream=False), lambda: total("trm_num_requests_running") == 1, AUTHORIZATION)
    cluster.wait(lambda: total("trm_num_requests_running") == 0, "let the second one go")
    cluster.wait(lambda: total("trm_client_disconnects_total") == departed + 2, "counted the two that left")


def test_the_entrance_answers_as_the_server_does(cluster: RayProcess) -> None:
    with httpx.Client(base_url=cluster.url, timeout=30) as client:
        refused = client.post("/v1/chat/completions", json=chat(QUESTIONS[0]))
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        client.headers.update(AUTHORIZATION)
        wrong = client.post("/v1/chat/completions", json=chat(QUESTIONS[0], colour="red"))
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "colour")
        named = client.post("/solve", json={"question": QUESTIONS[1]}, headers={"X-Request-Id": "mine"})
        assert named.json()["answer"] == "5"
        assert set(named.headers.get_list("X-Request-Id")) == {"mine"}
        assert "first_token" in named.headers["Server-Timing"]
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").json()["data"][0]["id"] == "qwen-trm"
        assert client.get("/").text.startswith("<!doctype html>")
