"""Draw a report: one PNG per question, only what was measured. Error bars and bands are 95 % intervals."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # told apart by colour-blind people too
CONTROL_COLOURS = (ORANGE, GREEN, "#CC79A7", "#E69F00")
GROUP_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", GREY)


def draw(directory: Path, report: dict[str, Any]) -> list[Path]:
    """Write the pictures of a report into its directory; returns their paths."""
    solutions = report.get("teacher_forced", {})
    figures = {"accuracy": _accuracy(report)}
    if "operations" in report:
        figures["operations"] = _operations(report)
    if solutions:
        figures["loss"] = _loss(report, solutions["loss_per_step"])
        figures["calibration"] = _calibration(report, solutions["calibration"])
    if "halting" in solutions:
        figures["halting"] = _halting(report, solutions["halting"])
    if "votes" in report:
        figures["votes"] = _votes(report)
    paths = []
    for name, figure in figures.items():
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _accuracy(report: dict[str, Any]) -> Figure:
    figure = _figure("Accuracy against effort", report)
    axes = figure.add_subplot(xlabel="effort (supervision steps per token)", ylabel="problems right")
    efforts = [row["effort"] for row in report["efforts"]]
    _points(axes, efforts, report["efforts"], "accuracy", color=BLUE, label="decoder")
    if baseline := report["baseline"]:
        _level(axes, baseline, GREY, "--", f"baseline: {baseline['name']}")
    for control, colour in zip(report.get("controls", []), cycle(CONTROL_COLOURS), strict=False):
        _level(axes, control, colour, ":", f"control: {control['name']}")
    _trained(axes, report)
    axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
    axes.set_xticks(efforts, [str(effort) for effort in efforts])
    axes.minorticks_off()
    _percent(axes)
    return _finish(figure)


def _operations(report: dict[str, Any]) -> Figure:
    figure = _figure("How many operations which effort can do", report)
    axes = figure.add_subplot(xlabel="effort (supervision steps per token)", ylabel="problems right")
    for group, colour in zip(report["operations"], cycle(GROUP_COLOURS), strict=False):
        efforts = [row["effort"] for row in group["efforts"]]
        number = group["operations"]
        label = f"{number} operation{'s' * (number != 1)} ({group['n']} problems)"
        _points(axes, efforts, group["efforts"], "accuracy", color=colour, label=label)
    _trained(axes, report)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(-0.02, 1.02)
    _percent(axes)
    return _finish(figure)


def _loss(report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Figure:
    figure = _figure(
        "What each supervision step gains on the problems' own solutions (teacher-forced)",
        report,
        report["teacher_forced"]["n"],
    )
    loss, right = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    _points(loss, steps, rows, "loss", color=BLUE, label="decoder; step 0 is the backbone")
    _points(right, steps, rows, "token_accuracy", "token_accuracy_interval", color=BLUE)
    _trained(loss, report)
    _trained(right, report)
    loss.set(ylabel="loss (nats per token)", yscale="log")
    right.set(xlabel="supervision step", ylabel="tokens right")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(right)
    return _finish(figure)


def _calibration(report: dict[str, Any], calibration: dict[str, Any]) -> Figure:
    steps = "step 1" if calibration["steps"] == 1 else f"steps 1 to {calibration['steps']}"
    figure = _figure(
        f"Calibration of the halting head, {steps}, tokens of the solutions (teacher-forced)",
        report,
        report["teacher_forced"]["n"],
    )
    share, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = calibration["bins"]
    predicted = [row["predicted"] for row in bins]
    label = f"measured; expected calibration error {calibration['error']:.2%}"
    share.plot([0, 1], [0, 1], "--", color=GREY, linewidth=0.8, label="perfect")
    _points(share, predicted, bins, "observed", color=BLUE, label=label)
    counts.bar(predicted, [row["tokens"] for row in bins], width=0.03, color=BLUE)
    share.set(ylabel="tokens whose likeliest\ntoken is right")
    counts.set(xlabel="the head's probability (mean of the bin)", ylabel="tokens", xlim=(-0.03, 1.03))
    counts.set(yscale="log", ylim=(0.5, None))
    _percent(share)
    return _finish(figure)


def _halting(report: dict[str, Any], halting: dict[str, Any]) -> Figure:
    figure = _figure(
        "What halting early costs, tokens of the solutions (teacher-forced)", report, report["teacher_forced"]["n"]
    )
    axes = figure.add_subplot(
        xlabel=f"mean supervision steps per token, of {halting['effort']}",
        ylabel=f"tokens as after all {halting['effort']} steps",
    )
    for name, label, colour in (
        ("fixed", "every token after the same number of steps", GREY),
        ("head", "halting head above a threshold", BLUE),
        ("movement", "probabilities move less than a tolerance", ORANGE),
    ):
        rows = halting[name]
        _points(axes, [row["mean_steps"] for row in rows], rows, "agreement", color=colour, label=label)
    _percent(axes)
    return _finish(figure)


def _votes(report: dict[str, Any]) -> Figure:
    votes = report["votes"]
    samples, effort = votes["samples"], votes["effort"]
    figure = _figure(f"Votes of {samples} samples at temperature {votes['temperature']}, effort {effort}", report)
    share, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    agreement = [row["agreement"] for row in votes["bins"]]
    _points(share, agreement, votes["bins"], "accuracy", color=BLUE, label="by agreement")
    _level(share, votes, GREEN, "--", "all votes")
    for row in report["efforts"]:
        if row["effort"] == effort:
            _level(share, row, ORANGE, ":", "greedy, one reply")
    counts.bar(agreement, [row["problems"] for row in votes["bins"]], width=0.5 / samples, color=BLUE)
    share.set(ylabel="problems right")
    counts.set(xlabel="agreement (share of samples with the winning answer)", ylabel="problems")
    counts.set(yscale="log", ylim=(0.5, None))
    _percent(share)
    return _finish(figure)


def _figure(title: str, report: dict[str, Any], num_problems: int | None = None) -> Figure:
    figure = Figure(figsize=(7, 5), layout="constrained", facecolor="white")
    number = num_problems or report["n"]
    about = f"{report['model']}\n{report['dataset']}, {number} problems; bars and bands are 95 % intervals"
    figure.suptitle(f"{title}\n{about}", fontsize=9)
    return figure


def _points(
    axes: Axes,
    at: Sequence[float],
    rows: Sequence[dict[str, Any]],
    name: str,
    interval: str = "interval",
    **style: Any,
) -> None:
    """Values with their intervals, joined."""
    values = [row[name] for row in rows]
    intervals = [row[interval] for row in rows]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)]
    axes.errorbar(at, values, [below, above], fmt="o-", capsize=3, markersize=4, elinewidth=1, **style)


def _level(axes: Axes, row: dict[str, Any], colour: str, line: str, label: str) -> None:
    """An accuracy that has no x: a line across, with its interval as a band."""
    axes.axhline(row["accuracy"], color=colour, linestyle=line, label=label)
    axes.axhspan(*row["interval"], color=colour, alpha=0.1, linewidth=0)


def _trained(axes: Axes, report: dict[str, Any]) -> None:
    label = "trained effort; beyond it extrapolation"
    axes.axvline(report["trained_effort"], color=GREY, linewidth=0.8, zorder=0, label=label)


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.5g} %")


def _finish(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure
