"""A real `trm-serve` under mixed traffic for as long as asked: what became of every request, and does anything grow?

Clients of all kinds (`server.bench.soak.traffic`) keep it busy, crowds overflow its queue, canaries are asked again and
again, and every few seconds the process is weighed. The judgement is a list of checks, each with what was seen.
"""

import asyncio
import json
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import psutil

from server.bench.serve import Server, as_flags, trm_serve
from server.bench.settings import SoakSettings
from server.bench.soak.canaries import Canary, make_canaries, part_at_near_tie
from server.bench.soak.connection import ask
from server.bench.soak.growth import Growth, growth
from server.bench.soak.memory import weigh
from server.bench.soak.traffic import BODY_TIMEOUT_S, CHAT, MAX_BODY_BYTES, Clients, Draw, Errand, Record
from trm.bench.workload import load
from trm.errors import TRMError

logger = logging.getLogger(__name__)

MAX_MODEL_LEN = 1024
QUEUE_PER_ROW = 2
WARM_UP = 0.2  # of the time; what it adds to memory is no growth
MIN_SAMPLE_PAUSE_S, MAX_SAMPLES = 0.25, 450
MIN_BURST_PAUSE_S, MAX_BURSTS = 5.0, 60
CANARY_PAUSE_S = 2.0
IDLE_S = 30  # within which a server must be idle once everybody has gone
NUM_BINS = 30  # of the pictures over time
MEGABYTE = 1e6
JUDGED = {"own_mb": 0.0, "descriptors": 1.0, "threads": 2.0}
"""What must not grow, and by how much it may at least: pools start a thread when two requests happen to meet."""
TOLD = ("rss_mb", "uss_mb")
"""What is measured beside it and judged by nobody: see `server.bench.soak.memory`."""
NAMES = {"own_mb": "memory of its own"}
AT_REST = {"malloc_mb": ("malloc has handed out", "MB"), "python_blocks": ("Python's objects hold", "blocks")}
"""What must not be more after the traffic than before, by the same share: a leak shows here first (`server.memory`)."""
Raw = dict[str, Any]


def max_queue(settings: SoakSettings) -> int:
    """Places in the server's queue: few enough that a crowd overflows it."""
    return QUEUE_PER_ROW * settings.max_rows


def server_arguments(settings: SoakSettings) -> dict[str, int]:
    """Small enough a context and queue that all of both is used."""
    return {
        "max-rows": settings.max_rows,
        "max-queue": max_queue(settings),
        "max-model-len": MAX_MODEL_LEN,
        "max-body-bytes": MAX_BODY_BYTES,
        "body-timeout-seconds": BODY_TIMEOUT_S,
        "num-threads": settings.num_threads,
    }


def _clocks(server_s: float = 0.0) -> np.ndarray:
    """Seconds: of the wall, and of CPU for the server, for this process, and for everybody on the machine."""
    machine = psutil.cpu_times()
    busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - getattr(machine, "guest", 0.0)
    return np.array([time.perf_counter(), server_s, time.process_time(), busy])


@dataclass
class Run:
    """What one run has seen."""

    server: Server
    clients: Clients
    draw: Draw
    samples: list[Raw] = field(default_factory=list)
    first_texts: list[str] = field(default_factory=list)
    canaries: list[tuple[int, str]] = field(default_factory=list)  # which, and what it said under load
    weighed: np.ndarray = field(default_factory=_clocks)  # of the sample before

    async def metrics(self) -> dict[str, float]:
        """Every series of the server's, by its name with its labels."""
        _, text = await ask(self.server.url, "GET", "/metrics")
        return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*) (\S+)$", text.decode(), re.MULTILINE)}

    async def weigh(self) -> Raw:
        """One sample. Cores in use, by the server, its clients and all others, are those since the one before."""
        process, connections = self.server.process, self.clients.connections
        with process.oneshot():
            memory = weigh(process)
            threads, descriptors = process.num_threads(), process.num_fds()
            clocks = _clocks(self.server.cpu_s)
        passed = clocks - self.weighed
        cores, clients, everybody = (passed[1:] / passed[0]).tolist()
        seen = await self.metrics()
        sample = {
            "at": round(float(clocks[0]) - self.clients.began, 2),
            "own_mb": round(memory.own / MEGABYTE, 2),
            "rss_mb": round(memory.resident / MEGABYTE, 2),
            "uss_mb": round(memory.private / MEGABYTE, 2),
            "python_blocks": int(seen["trm_python_blocks"]),
            "threads": threads,
            "descriptors": descriptors - connections,  # besides those of our own connections
            "connections": connections,
            "cores": round(cores, 3),
            "cores_of_clients": round(clients, 3),
            "cores_of_others": round(max(0.0, everybody - cores - clients), 3),
            "running": int(seen["trm_num_requests_running"]),
            "waiting": int(seen["trm_num_requests_waiting"]),
            "cache_usage": round(seen["trm_kv_cache_usage_ratio"], 4),
            "generation_tokens": int(seen["trm_generation_tokens_total"]),
        }
        if "trm_malloc_in_use_bytes" in seen:  # with glibc
            sample["malloc_mb"] = round(seen["trm_malloc_in_use_bytes"] / MEGABYTE, 2)
        self.weighed = clocks
        return sample


def measure(settings: SoakSettings) -> Raw:
    """Start a server, soak it, stop it; returns the report. Raises TRMError where the server is lost meanwhile."""
    with trm_serve(settings.model, server_arguments(settings)) as server:
        try:
            return asyncio.run(_soak(settings, server))
        except (OSError, psutil.Error) as error:
            words = server.log.read_text().strip().splitlines()[-1:]
            raise TRMError(f"trm-serve was lost: {error or type(error).__name__}; its last words: {words}") from error


async def _soak(settings: SoakSettings, server: Server) -> Raw:
    rng = random.Random(settings.seed)
    models = json.loads((await ask(server.url, "GET", "/v1/models"))[1])
    max_steps = models["data"][0]["max_supervision"]
    run = Run(server, Clients(server.url), Draw(rng, MAX_MODEL_LEN, max_steps))
    canaries = make_canaries(run.draw.questions, max_steps)
    for canary in canaries:
        record = await run.clients.once(Errand("canary, alone", CHAT, canary.body))
        run.first_texts.append(record.told.texts[0] if record.told else "")
    await asyncio.gather(*(run.clients.once(errand) for errand in run.draw.filling(settings.max_rows)))
    before = await _idle(run)
    logger.info("warm: %s", before)
    await _traffic(run, settings, canaries, rng)
    after = await _idle(run, before["descriptors"])
    logger.info("idle again: %s", after)
    metrics = await run.metrics()
    status = server.stop()
    return _report(settings, run, canaries, before, after, metrics, status, server.log.read_text())


async def _traffic(run: Run, settings: SoakSettings, canaries: Sequence[Canary], rng: random.Random) -> None:
    """Everybody at once, until the time is over and the last one has gone."""
    clients, seconds = run.clients, 60 * settings.minutes
    clients.began = time.perf_counter()
    until = clients.began + seconds

    async def weigh() -> None:
        pause, said = max(MIN_SAMPLE_PAUSE_S, seconds / MAX_SAMPLES), 0
        while time.perf_counter() < until:
            run.samples.append(sample := await run.weigh())
            if sample["at"] >= said * seconds / 10:
                logger.info("%3d %%: %s", 10 * said, sample)
                said += 1
            passed = time.perf_counter() - clients.began
            await asyncio.sleep(pause - passed % pause)

    async def crowds() -> None:
        pause = max(MIN_BURST_PAUSE_S, seconds / MAX_BURSTS)
        while time.perf_counter() < until - pause:
            await asyncio.sleep(pause)
            crowd = run.draw.burst(settings.max_rows + max_queue(settings))
            await asyncio.gather(*(clients.once(errand) for errand in crowd))

    async def sing() -> None:
        number = 0
        while time.perf_counter() < until:
            which = number % len(canaries)
            stream = number // len(canaries) % 2 == 1
            record = await clients.once(Errand("canary", CHAT, canaries[which].body | {"stream": stream}))
            if record.told:
                run.canaries.append((which, record.told.texts[0]))
            number += 1
            await asyncio.sleep(CANARY_PAUSE_S)

    workers = (clients.work(run.draw, until, rng) for _ in range(settings.max_rows))
    await asyncio.gather(weigh(), crowds(), sing(), *workers)


async def _idle(run: Run, descriptors: int | None = None) -> Raw:
    """The server with nobody there, once it is as it should be or IDLE_S are over. `descriptors`: as many at most."""
    deadline = time.perf_counter() + IDLE_S
    while True:
        await asyncio.sleep(0.5)
        found = await run.weigh()
        busy = found["running"] or found["waiting"] or found["cache_usage"]
        more = descriptors is not None and found["descriptors"] > descriptors
        if time.perf_counter() > deadline or not (busy or more):
            return found


def _report(
    settings: SoakSettings,
    run: Run,
    canaries: Sequence[Canary],
    before: Raw,
    after: Raw,
    metrics: dict[str, float],
    status: int,
    log: str,
) -> Raw:
    """Everything that was seen, and what to think of it."""
    records = run.clients.records
    differing = [(which, text) for which, text in run.canaries if text != run.first_texts[which]]
    broken = [
        {"canary": which, "alone": run.first_texts[which], "under_load": text}
        for which, text in differing
        if not _same_text(settings, canaries[which], run.first_texts[which], text)
    ]
    counts = outcomes(records)
    grown = {name: growth_of(run.samples, name, 60 * settings.minutes) for name in (*JUDGED, *TOLD)}
    troubles = [line for line in log.splitlines() if re.search(r'"level": "(error|critical|warning)"|Traceback', line)]
    report = {
        "minutes": settings.minutes,
        "server": as_flags(settings.model, server_arguments(settings)),
        "max_growth": settings.max_growth,
        "outcomes": counts,
        "failures": [vars(record) | {"told": None} for record in records if record.outcome == "failed"][:100],
        "refusals": refusals(records),
        "rejected": rejected(metrics),
        "tokens": run.samples[-1]["generation_tokens"],
        "canaries": {"asked": len(run.canaries), "near_ties": len(differing) - len(broken), "broken": broken},
        "before": before,
        "after": after,
        "growth": {name: vars(one) for name, one in grown.items()},
        "exit_status": status,
        "log_troubles": troubles[:20],
        "latency": latencies(records, 60 * settings.minutes),
        "over_time": over_time(records, 60 * settings.minutes),
        "samples": run.samples,
    }
    left = sum(record.outcome == "left" for record in records)
    report["checks"] = checks(report, grown, left, metrics["trm_client_disconnects_total"], set(run.draw.kinds))
    return report


def _same_text(settings: SoakSettings, canary: Canary, alone: str, under_load: str) -> bool:
    """Whether two different texts are as good as equal. Only here does this process need the model."""
    return part_at_near_tie(*load(settings.model, settings.num_threads), canary, alone, under_load)


def growth_of(samples: Sequence[Raw], name: str, seconds: float) -> Growth:
    """The trend of one figure after the warm-up, while there was traffic."""
    kept = [sample for sample in samples if WARM_UP * seconds <= sample["at"] <= seconds]
    return growth([sample["at"] for sample in kept], [sample[name] for sample in kept])


def outcomes(records: Sequence[Record]) -> Raw:
    """How many of each kind ended how."""
    kinds = dict.fromkeys(record.kind for record in records)
    return {kind: dict(Counter(record.outcome for record in records if record.kind == kind)) for kind in kinds}


def refusals(records: Sequence[Record]) -> dict[str, int]:
    """How many refusals clients have seen, by reason."""
    return dict(Counter(record.why for record in records if record.outcome == "refused"))


def rejected(metrics: dict[str, float]) -> dict[str, int]:
    """How many the server has counted, by reason."""
    found = {re.fullmatch(r'trm_request_rejected_total\{reason="(\w+)"\}', name): n for name, n in metrics.items()}
    return {match[1]: int(number) for match, number in found.items() if match}


def checks(
    report: Raw, grown: dict[str, Growth], left: int, departures: float, kinds: set[str]
) -> list[dict[str, Any]]:
    """What must hold, whether it does, and what was seen."""
    done = report["outcomes"]
    failed = sum(count.get("failed", 0) for count in done.values())
    total = sum(sum(count.values()) for count in done.values())
    missing = [kind for kind in kinds if kind not in done or set(done[kind]) <= {"failed"}]
    seen, told = report["refusals"], report["rejected"]
    # who left may have been refused without seeing it
    books = all(
        seen.get(reason, 0) <= told.get(reason, 0) <= seen.get(reason, 0) + (left if reason == "overloaded" else 0)
        for reason in seen | told
    )
    before, after, canaries = report["before"], report["after"], report["canaries"]
    rows = [
        ("every request is accounted for", not failed, f"{failed} of {total} failed"),
        ("every kind of client was there", not missing, f"{', '.join(missing) or 'none'} missing"),
        ("a full queue refused some", seen.get("overloaded", 0) > 0, f"{seen.get('overloaded', 0)} refusals"),
        (
            "the server's books agree with ours",
            books,
            f"{sum(seen.values())} refusals in ours, {sum(told.values())} in its own",
        ),
        (
            "the server saw clients leave, no more than left",
            0 < departures <= left,
            f"{departures:.0f} seen, {left} left",
        ),
        (
            "canaries sing as they did alone",
            canaries["asked"] > 0 and not canaries["broken"],
            f"{canaries['asked']} asked, {canaries['near_ties']} differed at near ties, "
            f"{len(canaries['broken'])} elsewhere",
        ),
        (
            "no row, no queue and no reserved cache is left",
            not (after["running"] or after["waiting"] or after["cache_usage"]),
            f"{after['running']:.0f} rows, {after['waiting']:.0f} waiting, {after['cache_usage']:.1%} reserved",
        ),
        (
            "no descriptor is left",
            after["descriptors"] <= before["descriptors"],
            f"{before['descriptors']} before, {after['descriptors']} after",
        ),
        *(
            (
                f"at rest, {what} less than {report['max_growth']:.0%} more",
                after[name] < (1 + report["max_growth"]) * before[name],
                f"{before[name]:.7g} {unit} before, {after[name]:.7g} after",
            )
            for name, (what, unit) in AT_REST.items()
            if name in before
        ),
        ("nothing of note is in the log", not report["log_troubles"], f"{len(report['log_troubles'])} lines"),
        ("SIGTERM ends it with status 0", report["exit_status"] == 0, f"status {report['exit_status']}"),
    ]
    rows += [
        (
            f"{NAMES.get(name, name)} grew by less than {report['max_growth']:.0%}" + (f" or {unit:g}" if unit else ""),
            grown[name].below(report["max_growth"], unit),
            f"{grown[name]} of {grown[name].level:.1f}",
        )
        for name, unit in JUDGED.items()
    ]
    return [{"check": name, "holds": bool(holds), "seen": said} for name, holds, said in rows]


LATENCIES: dict[str, tuple[str, str]] = {
    "chat, whole answer": ("chat", "seconds"),
    "chat, first piece of a stream": ("chat, streamed", "first_s"),
    "refusal of a bad request": ("bad request", "seconds"),
    "probes, models, tokens": ("no decoding", "seconds"),
}


def latencies(records: Sequence[Record], seconds: float) -> Raw:
    """Median and 95th percentile, by when the request began. A body that never comes is refused late on purpose."""
    found: Raw = {}
    for name, (kind, figure) in LATENCIES.items():
        of_kind = [
            record
            for record in records
            if record.kind == kind and record.outcome != "failed" and record.why not in ("overloaded", "slow_body")
        ]
        bins: list[Raw] = []
        for start, end in _bins(seconds):
            values = [getattr(record, figure) for record in of_kind if start <= record.at < end]
            if values:
                low, high = np.percentile(values, (50, 95))
                bins.append({"at": (start + end) / 2, "p50_s": round(low, 4), "p95_s": round(high, 4)})
        found[name] = bins
    return found


def over_time(records: Sequence[Record], seconds: float) -> list[Raw]:
    """How many ended how, by when they began."""
    return [
        {"at": (start + end) / 2, "seconds": end - start}
        | dict(Counter(record.outcome for record in records if start <= record.at < end))
        for start, end in _bins(seconds)
    ]


def _bins(seconds: float) -> list[tuple[float, float]]:
    edges = np.linspace(0, seconds, NUM_BINS + 1).tolist()
    return list(pairwise(edges))
