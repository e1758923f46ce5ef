"""A soak's pictures. Alone in needing matplotlib, which nobody else of trm-bench waits for."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from server.bench.soak.growth import Growth
from server.bench.soak.run import WARM_UP

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
COLOURS = {"answered": BLUE, "refused": GREEN, "left": PURPLE, "failed": ORANGE}
Report = dict[str, Any]


def draw(report: Report) -> dict[str, Figure]:
    """Each picture by its name."""
    return {
        "memory": _memory(report),
        "process": _process(report),
        "load": _load(report),
        "latency": _latency(report),
        "outcomes": _outcomes(report),
    }


def _memory(report: Report) -> Figure:
    figure, (axes, share) = _figure(report, "Memory of the server", 2)
    for name, label, colour in (
        ("own_mb", "its own", BLUE),
        ("uss_mb", "private", GREEN),
        ("rss_mb", "resident", GREY),
    ):
        _samples(axes, report, name, color=colour, label=f"{label}, {Growth(**report['growth'][name])}")
        _trend(axes, report, name, colour)
    axes.set(ylabel="MB")
    axes.set_ylim(bottom=0)
    level, limit = report["growth"]["own_mb"]["level"], 100 * report["max_growth"]
    for sign in (-1, 1):
        share.axhline(sign * limit, color=ORANGE, linewidth=0.8, label="limit of growth" if sign > 0 else None)
    samples = report["samples"]
    away = [100 * (sample["own_mb"] / level - 1) for sample in samples]
    share.plot([sample["at"] / 60 for sample in samples], away, color=BLUE, linewidth=0.8, label="its own")
    share.plot(
        [WARM_UP * report["minutes"], report["minutes"]],
        [0, 100 * report["growth"]["own_mb"]["share"]],
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
    for outcome, colour in COLOURS.items():
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
        axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2)
    figure.axes[-1].set_xlabel("minutes; shaded: warm-up")
    return figure
