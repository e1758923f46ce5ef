"""A soak's report: a page to read, pictures, and everything as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.bench.soak.growth import STRETCHES, Growth
from server.bench.soak.run import WARM_UP

OUTCOMES = ("answered", "refused", "left", "failed")
PICTURES = {
    "memory": "Memory",
    "process": "Descriptors and threads",
    "load": "Load",
    "latency": "Latency",
    "outcomes": "Outcomes",
}
BESIDE = {
    "rss_mb": "resident memory: its own, and pages of files",
    "uss_mb": "private memory: its own, and pages of files that no other process has in view",
}
Report = dict[str, Any]


def write(directory: Path, report: Report) -> None:
    """`README.md`, `report.json` and the pictures."""
    from server.bench.soak import pictures  # which needs matplotlib

    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.draw(report).items():
        figure.savefig(directory / f"{name}.png", dpi=110)
    (directory / "report.json").write_text(_json(report), encoding="utf-8")
    (directory / "README.md").write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The report for people."""
    before, after, canaries = report["before"], report["after"], report["canaries"]
    shown = [f"![{title}]({name}.png)\n" for name, title in PICTURES.items()]
    return "\n".join(
        [
            f"# Soak: {report['minutes']:g} minutes of mixed traffic\n",
            f"`trm-bench soak`, {report['max_rows']} rows, {report['threads']} threads, seed {report['seed']}, "
            f"torch {report['torch']}, {report['machine']}. "
            f"The server decoded {report['tokens']} tokens; on average it used {_mean(report, 'cores')} cores, its "
            f"clients {_mean(report, 'cores_of_clients')}, and other processes {_mean(report, 'cores_of_others')}: "
            "latencies are those of a machine that they share.\n",
            f"    trm-serve {' '.join(report['server'])}\n",
            table(report),
            f"\nIdle before and after: {before['own_mb']:.0f} and {after['own_mb']:.0f} MB of its own, "
            f"{before['rss_mb']:.0f} and {after['rss_mb']:.0f} MB resident, "
            f"{before['descriptors']} and {after['descriptors']} descriptors, "
            f"{before['threads']} and {after['threads']} threads. Growth is that of a line through the medians of "
            f"{STRETCHES} stretches of time, after a warm-up of {WARM_UP:.0%}; in brackets its 95 % interval, whose "
            "upper end must be below the limit. Memory of its own is what the server has written and no file backs: "
            "heaps and stacks. Resident memory has pages of files besides, mostly of libraries. Private memory counts "
            "those that no other process has in view: it moves when other processes come and go.\n",
            "## What became of the requests\n",
            "| | " + " | ".join(OUTCOMES) + " |",
            "|---|" + "---|" * len(OUTCOMES),
            *(
                f"| {kind} | " + " | ".join(str(counts.get(outcome, "")) for outcome in OUTCOMES) + " |"
                for kind, counts in report["outcomes"].items()
            ),
            f"\nRefused, as clients saw it: {_counts(report['refusals'])}. "
            f"As the server counted it: {_counts(report['rejected'])} (who left may not have seen a refusal).\n",
            f"Canaries: {canaries['asked']} asked under load, {canaries['near_ties']} differed from what they said "
            f"alone where two tokens were nearly tied, {len(canaries['broken'])} elsewhere.\n",
            *_list("Failures", [f"{one['kind']}: {one['why']}" for one in report["failures"]]),
            *_list("In the log", report["log_troubles"]),
            *shown,
        ]
    )


def table(report: Report) -> str:
    """The checks."""
    rows = [f"| {row['check']} | {'yes' if row['holds'] else '**NO**'} | {row['seen']} |" for row in report["checks"]]
    for name, what in BESIDE.items():
        files = [sample[name] - sample["own_mb"] for sample in report["samples"]]
        seen = f"{_growth(report, name)}; {min(files):.0f} to {max(files):.0f} MB of files"
        rows.append(f"| {what} | not judged | {seen} |")
    return "\n".join(["| check | holds | seen |", "|---|---|---|", *rows])


def _json(report: Report) -> str:
    """Indented but for the long lists, which have a line for each entry."""
    lines = []
    for name, value in report.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _mean(report: Report, name: str) -> str:
    samples = report["samples"]
    return f"{sum(sample[name] for sample in samples) / len(samples):.2f}"


def _growth(report: Report, name: str) -> str:
    return str(Growth(**report["growth"][name]))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()) if number) or "none"


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}\n", *(f"- `{line}`" for line in lines), ""] if lines else []
