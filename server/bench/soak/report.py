"""A soak's report: a page to read, pictures, and everything as JSON."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from server.bench.soak.growth import STRETCHES, Growth
from server.bench.soak.run import WARM_UP

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
OUTCOMES = {"answered": BLUE, "refused": GREEN, "left": PURPLE, "failed": ORANGE}
PICTURES = {
    "memory": "Memory",
    "process": "Descriptors and threads",
    "load": "Load",
    "latency": "Latency",
    "outcomes": "Outcomes",
}
Report = dict[str, Any]


def write(directory: Path, report: Report) -> None:
    """`README.md`, `report.json` and the pictures."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, draw in (
        ("memory", _memory),
        ("process", _process),
        ("load", _load),
        ("latency", _latency),
        ("outcomes", _outcomes),
    ):
        draw(report).savefig(directory / f"{name}.png", dpi=110)
    (directory / "report.json").write_text(_json(report), encoding="utf-8")
    (directory / "README.md").write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The report for people."""
    before, after, canaries = report["before"], report["after"], report["canaries"]
    pictures = [f"![{title}]({name}.png)\n" for name, title in PICTURES.items()]
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
            f"\nIdle before and after: {before['rss_mb']:.0f} and {after['rss_mb']:.0f} MB resident, "
            f"{before['descriptors']} and {after['descriptors']} descriptors, "
            f"{before['threads']} and {after['threads']} threads. Growth is that of a line through the medians of "
            f"{STRETCHES} stretches of time, after a warm-up of {WARM_UP:.0%}; in brackets its 95 % interval, whose "
            f"upper end must be below the limit. Of private memory alone it is {_growth(report, 'uss_mb')}.\n",
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
            *pictures,
        ]
    )


def table(report: Report) -> str:
    """The checks."""
    rows = [f"| {row['check']} | {'yes' if row['holds'] else '**NO**'} | {row['seen']} |" for row in report["checks"]]
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


# Pictures


def _memory(report: Report) -> Figure:
    figure, (axes, share) = _figure(report, "Memory of the server", 2)
    for name, label, colour in (("rss_mb", "resident", BLUE), ("uss_mb", "private", GREEN)):
        _samples(axes, report, name, color=colour, label=f"{label}, growth {_growth(report, name)}")
        _trend(axes, report, name, colour)
    axes.set(ylabel="MB")
    axes.set_ylim(bottom=0)
    level, limit = report["growth"]["rss_mb"]["level"], 100 * report["max_growth"]
    for sign in (-1, 1):
        share.axhline(sign * limit, color=ORANGE, linewidth=0.8, label="limit of growth" if sign > 0 else None)
    samples = report["samples"]
    away = [100 * (sample["rss_mb"] / level - 1) for sample in samples]
    share.plot([sample["at"] / 60 for sample in samples], away, color=BLUE, linewidth=0.8, label="resident")
    share.plot(
        [WARM_UP * report["minutes"], report["minutes"]],
        [0, 100 * report["growth"]["rss_mb"]["share"]],
        "--",
        color=BLUE,
        label="its trend",
    )
    share.set(ylabel="% from the level\nafter warm-up", ylim=(-4 * limit, 4 * limit))
    return _finish(figure, report)


def _process(report: Report) -> Figure:
    figure, (descriptors, threads, cores) = _figure(report, "Descriptors, threads and processor of the server", 3)
    _samples(descriptors, report, "descriptors", color=BLUE, label="descriptors besides connections")
    _samples(descriptors, report, "connections", color=GREY, label="connections of the clients", linewidth=0.7)
    _samples(threads, report, "threads", color=ORANGE, label="threads")
    _samples(cores, report, "cores", color=GREEN, label="cores in use by the server")
    _samples(cores, report, "cores_of_others", color=GREY, label="by other processes", linewidth=0.7)
    descriptors.set(ylabel="descriptors")
    threads.set(ylabel="threads")
    cores.set(ylabel="cores")
    for axes in (descriptors, threads, cores):
        axes.set_ylim(bottom=0)
    return _finish(figure, report)


def _load(report: Report) -> Figure:
    figure, (rows, cache, rate) = _figure(report, "Rows, queue, cache and tokens", 3)
    _samples(rows, report, "waiting", color=ORANGE, label="waiting in the queue", linewidth=0.8)
    _samples(rows, report, "running", color=BLUE, label="rows being decoded")
    _samples(cache, report, "cache_usage", color=GREEN, label="share of the cache that is reserved")
    samples = report["samples"][:: max(1, len(report["samples"]) // 60)]
    pairs = list(pairwise(samples))
    rates = [(new["generation_tokens"] - old["generation_tokens"]) / (new["at"] - old["at"]) for old, new in pairs]
    rate.plot([new["at"] / 60 for _, new in pairs], rates, color=PURPLE, label="tokens per second")
    rows.set(ylabel="requests")
    cache.set(ylabel="reserved", ylim=(0, 1))
    rate.set(ylabel="tokens/s")
    rate.set_ylim(bottom=0)
    return _finish(figure, report)


def _latency(report: Report) -> Figure:
    figure, panels = _figure(report, "Latency by when a request was sent: median and (dotted) 95th percentile", 4)
    for axes, (name, bins), colour in zip(
        panels, report["latency"].items(), (BLUE, GREEN, ORANGE, PURPLE), strict=True
    ):
        at = [one["at"] / 60 for one in bins]
        axes.plot(at, [one["p50_s"] for one in bins], color=colour, label=name)
        axes.plot(at, [one["p95_s"] for one in bins], color=colour, linestyle=":")
        axes.set(yscale="log", ylabel="seconds")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    return _finish(figure, report)


def _outcomes(report: Report) -> Figure:
    figure, (axes,) = _figure(report, "How requests ended, by when they were sent", 1)
    bins = report["over_time"]
    base = [0.0] * len(bins)
    for outcome, colour in OUTCOMES.items():
        rates = [one.get(outcome, 0) / one["seconds"] for one in bins]
        total = sum(counts.get(outcome, 0) for counts in report["outcomes"].values())
        width = bins[0]["seconds"] / 60
        axes.bar(
            [one["at"] / 60 for one in bins],
            rates,
            width,
            base,
            color=colour,
            label=f"{outcome}: {total}",
            linewidth=0,
        )
        base = [low + rate for low, rate in zip(base, rates, strict=True)]
    axes.set(ylabel="requests per second")
    return _finish(figure, report)


def _figure(report: Report, title: str, panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(7, 2.2 + 1.7 * panels), layout="constrained", facecolor="white")
    about = f"{report['minutes']:g} minutes of mixed traffic, {report['max_rows']} rows, {report['machine']}"
    figure.suptitle(f"{title}\n{about}", fontsize=9)
    return figure, list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])


def _samples(axes: Axes, report: Report, name: str, **style: Any) -> None:
    samples = report["samples"]
    axes.plot([one["at"] / 60 for one in samples], [one[name] for one in samples], **({"linewidth": 1.2} | style))


def _trend(axes: Axes, report: Report, name: str, colour: str) -> None:
    grown, minutes = report["growth"][name], report["minutes"]
    ends = [grown["level"], grown["level"] * (1 + grown["share"])]
    axes.plot([WARM_UP * minutes, minutes], ends, color=colour, linestyle="--", linewidth=1)


def _finish(figure: Figure, report: Report) -> Figure:
    for axes in figure.axes:
        axes.axvspan(0, WARM_UP * report["minutes"], color=GREY, alpha=0.12, linewidth=0, zorder=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, report["minutes"])
        axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=4)
    figure.axes[-1].set_xlabel("minutes; shaded: warm-up")
    return figure
