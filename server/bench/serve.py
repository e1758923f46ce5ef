"""What HTTP costs: tokens per second through a real `trm-serve` against the bare engine, on the same requests.

Both take turns. The server is a process of its own, started as a user starts it; the clients are
another one. The engine's threads, rows and positions are the same in both. Nobody drafts: how much
depends on times that each engine measures for itself, and a chunk for every token is the harder case.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from server.bench import clients
from server.bench.settings import ServeBenchSettings
from trm.bench.workload import decode_with_engine, load, make_questions, make_requests
from trm.engine import Engine, EngineConfig
from trm.errors import ConfigError
from trm.processes import child_process
from trm.settings import ENV_PREFIX

START_TIMEOUT_S = 300
Raw = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A running `trm-serve`, and the file that holds its log."""

    url: str
    child: subprocess.Popen[bytes]
    process: psutil.Process
    log: Path

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU that it has taken, all threads together."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def stop(self) -> int:
        """Tell it to, once; returns its exit status."""
        return _stop(self.child)


@contextmanager
def trm_serve(model: str | None, arguments: Mapping[str, Any]) -> Iterator[Server]:
    """A server of this model, by default the bundled one, with no other settings than these, stopped at the end.

    Raises ConfigError with its last words where it does not start.
    """
    command = [str(Path(sys.executable).with_name("trm-serve")), "--port=0", *as_flags(model, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    with (
        tempfile.NamedTemporaryFile("r") as log,
        open(log.name, "w") as out,
        child_process(command, _stop, stdout=out, stderr=out, env=environment) as process,
    ):
        yield Server(_url(process, Path(log.name)), process, psutil.Process(process.pid), Path(log.name))


def as_flags(model: str | None, arguments: Mapping[str, Any]) -> list[str]:
    """Settings of `trm-serve` as its command line has them."""
    named = arguments if model is None else {"model": model, **arguments}
    return [f"--{name}={value}" for name, value in named.items()]


def _stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()  # nothing happens to one that has ended
    return process.wait(60)


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server listens, once it says that it serves."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"serving \S+ on (http://[\w.:\[\]]+)", log.read_text()):
            return found[1]
        time.sleep(0.05)
    words = log.read_text().strip().splitlines()
    raise ConfigError(f"trm-serve did not start: {words[-1] if words else 'no word from it'}")


def post_all(url: str, num_streams: int, bodies: Sequence[Any]) -> Raw:
    """The report of `server.bench.clients` on these chats."""
    address = urlsplit(url)
    job = {"host": address.hostname, "port": address.port, "path": "/v1/chat/completions"}
    done = subprocess.run(
        [sys.executable, "-P", clients.__file__],
        input=json.dumps(job | {"streams": num_streams, "bodies": list(bodies)}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"the clients failed: {done.stderr.strip().splitlines()[-1]}")
    report: Raw = json.loads(done.stdout)
    return report


def measure(settings: ServeBenchSettings) -> Raw:
    """`repeats` runs of both, in turn, after one of each that warms up: raw times, and the ratios they come to."""
    model, chat = load(settings.model, settings.num_threads)
    num_requests, num_streams, seed = settings.num_requests, settings.max_rows, settings.seed
    efforts = [model.config.n_supervision]
    requests = make_requests(chat, num_requests, efforts, seed)
    longest = max(request.positions for request in requests)
    engine = Engine(model, chat, EngineConfig(num_streams, longest, num_requests, max_draft_tokens=0))
    bodies = [
        {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": params.max_tokens,
            "supervision_steps": params.n_supervision,
            "ignore_eos": params.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for question, params in make_questions(num_requests, efforts, seed)
    ]
    arguments = {
        "max-rows": num_streams,
        "max-model-len": longest,
        "num-threads": settings.num_threads,
        "max-draft-tokens": 0,
    }
    bare, bare_cpu_s, http = [], [], []
    with trm_serve(settings.model, arguments) as server:
        for _ in range(1 + settings.repeats):
            before = time.process_time()
            bare.append(decode_with_engine(engine, requests))
            bare_cpu_s.append(time.process_time() - before)
            before = server.cpu_s
            http.append(post_all(server.url, num_streams, bodies) | {"server_cpu_s": server.cpu_s - before})
    texts = [chat.decode(ids) for ids in bare[-1].replies]
    raw: Raw = {
        "tokens": sum(request.params.max_tokens for request in requests),
        "tokens_over_http": sum(reply["tokens"] for reply in http[-1]["replies"]),
        "requests_equal": sum(reply["text"] == text for reply, text in zip(http[-1]["replies"], texts, strict=True)),
        "engine_wall_s": [run.seconds for run in bare[1:]],
        "engine_cpu_s": bare_cpu_s[1:],
        "http_wall_s": [run["wall_s"] for run in http[1:]],
        "clients_cpu_s": [run["cpu_s"] for run in http[1:]],
        "server_cpu_s": [run["server_cpu_s"] for run in http[1:]],
        "first_token_s": [reply["first_s"] for run in http[1:] for reply in run["replies"]],
        "gaps_s": [gap for run in http[1:] for reply in run["replies"] for gap in reply["gaps_s"]],
    }
    return {**ratios(raw), "requests": num_requests, "raw": raw}


def ratios(raw: Raw) -> Raw:
    """The figures that the raw times come to. A CPU share is seconds of CPU per second of the run."""
    shares = {
        f"{name}_cpu_share": median(cpu / wall for cpu, wall in zip(raw[f"{name}_cpu_s"], raw[walls], strict=True))
        for name, walls in (("engine", "engine_wall_s"), ("server", "http_wall_s"), ("clients", "http_wall_s"))
    }
    percentiles = {
        f"{name}_p{percent}_s": float(np.percentile(raw[key], percent))
        for name, key in (("first_token", "first_token_s"), ("inter_token", "gaps_s"))
        for percent in (50, 95)
    }
    rates = {f"{name}_tokens_per_s": raw["tokens"] / median(raw[f"{name}_wall_s"]) for name in ("http", "engine")}
    return {
        "http_vs_engine": rates["http_tokens_per_s"] / rates["engine_tokens_per_s"],
        "server_cpu_vs_engine": median(raw["server_cpu_s"]) / median(raw["engine_cpu_s"]),
        **rates,
        **percentiles,
        **shares,
    }


def table(result: Raw) -> str:
    """The result for people."""
    raw = result["raw"]

    def ms(name: str) -> str:
        return f"{1e3 * result[f'{name}_p50_s']:.1f} ms, p95 {1e3 * result[f'{name}_p95_s']:.1f} ms"

    return "\n".join(
        [
            f"{result['requests']} requests, {raw['tokens']} tokens, {result['max_rows']} streams, "
            f"{result['threads']} threads, torch {result['torch']}",
            "",
            "| | |",
            "|---|---|",
            f"| tokens/s over HTTP / of the bare engine | {result['http_vs_engine']:.3f}: "
            f"{result['http_tokens_per_s']:.0f} against {result['engine_tokens_per_s']:.0f}; "
            f"{raw['requests_equal']} of {result['requests']} replies equal |",
            f"| time to first token | {ms('first_token')} |",
            f"| between tokens | {ms('inter_token')} |",
            f"| CPU seconds of the server / of the bare engine | {result['server_cpu_vs_engine']:.3f} |",
            f"| cores used by engine, server, clients | {result['engine_cpu_share']:.2f}, "
            f"{result['server_cpu_share']:.2f}, {result['clients_cpu_share']:.2f} |",
        ]
    )
