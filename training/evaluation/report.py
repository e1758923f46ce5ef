"""Put answers together: accuracy with intervals, paired tests, votes; as JSON, CSV and a table to read."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.evaluation.algebra import count_verdicts
from training.evaluation.answers import Answer, Key
from training.evaluation.candidates import Candidate, Run
from training.evaluation.decoding import keys
from training.evaluation.statistics import holm, paired, wilson_interval
from trm import checkpoint
from trm.voting import VOTING_TEMPERATURE, ballot, majority

REPORT_FILE = "report.json"
CSV_FILE = "report.csv"
OWN_BACKBONE = "frozen backbone"  # the baseline that every model of ours brings along: itself at effort 0
UNTESTED = {"wins": None, "losses": None, "mcnemar_p": None}
SAME = {"wins": 0, "losses": 0, "mcnemar_p": 1.0}  # the baseline next to itself


def build_report(
    candidates: Sequence[Candidate], answers: Mapping[Key, Answer], operations: Sequence[int], trained: int
) -> dict[str, Any]:
    """Accuracy per effort against the baseline, and of the trained effort against the controls.

    `operations` holds for each problem how many it takes, 0 where that is not known. `wins` and `losses` are problems
    that only the decoder, or only what it is compared with, got right; p values are corrected for the number of
    efforts compared, and for that of controls.
    """
    by_run = {
        run: [answers[key] for key in keys(run, len(operations))] for candidate in candidates for run in candidate.runs
    }
    model = candidates[0]
    efforts = [run for run in model.runs if not run.samples]
    baselines = {candidate.runs[0]: candidate.name for candidate in candidates if candidate.role == "baseline"}
    baselines = baselines or {run: OWN_BACKBONE for run in efforts if run.effort == 0}
    report: dict[str, Any] = {"baseline": None}
    tests: dict[Run, dict[str, Any]] = {}
    for baseline, name in baselines.items():  # one, or none
        report["baseline"] = {"name": name, "effort": 0} | summarize(by_run[baseline])
        others = [run for run in efforts if run != baseline]
        pairs = [(by_run[run], by_run[baseline]) for run in others]
        tests = {baseline: SAME} | dict(zip(others, _test(pairs), strict=True))
    report["efforts"] = [{"effort": run.effort} | summarize(by_run[run]) | tests.get(run, UNTESTED) for run in efforts]
    controls = [candidate for candidate in candidates if candidate.role == "control"]
    if controls:
        ours, theirs = by_run[Run(model.name, trained)], [by_run[control.runs[0]] for control in controls]
        report["controls"] = [
            {"name": control.name, "compute": control.compute} | summarize(replies) | test
            for control, replies, test in zip(controls, theirs, _test([(ours, t) for t in theirs]), strict=True)
        ]
        report["control"] = report["controls"][0]
    if len(set(operations)) > 1:
        others = [control.runs[0] for control in controls]
        report["operations"] = [
            by_operations(number, operations, by_run, efforts, others) for number in sorted(set(operations) - {0})
        ]
    for run in model.runs:
        if run.samples:
            report["votes"] = summarize_votes(by_run[run], run)
    report["verdicts"] = count_verdicts(answer for run in by_run for answer in by_run[run])
    return report


def summarize(replies: Sequence[Answer]) -> dict[str, Any]:
    """Accuracy with its interval, what Math-Verify would make of it, and what the replies took."""
    right = [reply.right for reply in replies]
    control = [reply.math_verify for reply in replies if reply.math_verify is not None]
    accuracy = _accuracy(right) | {"correct": sum(right)}
    if len(control) == len(replies):
        accuracy["math_verify"] = sum(control) / len(control)
    return accuracy | _took(replies, len(replies))


def by_operations(
    number: int,
    operations: Sequence[int],
    by_run: Mapping[Run, Sequence[Answer]],
    efforts: Sequence[Run],
    controls: Sequence[Run],
) -> dict[str, Any]:
    """Accuracy on the problems that take so many operations, of every effort and every control."""
    chosen = [index for index, count in enumerate(operations) if count == number]

    def accuracy(run: Run) -> dict[str, Any]:
        return _accuracy([by_run[run][index].right for index in chosen])

    return {
        "operations": number,
        "n": len(chosen),
        "efforts": [{"effort": run.effort} | accuracy(run) for run in efforts],
        "controls": [{"name": run.candidate} | accuracy(run) for run in controls],
    }


def summarize_votes(replies: Sequence[Answer], run: Run) -> dict[str, Any]:
    """Accuracy of the majority, overall and by the share of samples that agree. `replies` lie problem by problem."""
    by_agreement: dict[float, list[bool]] = defaultdict(list)
    for first in range(0, len(replies), run.samples):
        samples = replies[first : first + run.samples]
        vote = majority([ballot(sample.reply) for sample in samples])
        by_agreement[vote.agreement].append(samples[vote.speaker].right)
    right = [one for group in by_agreement.values() for one in group]
    return {
        "effort": run.effort,
        "samples": run.samples,
        "temperature": VOTING_TEMPERATURE,
        **_accuracy(right),
        **_took(replies, len(right)),
        "bins": [
            {"agreement": agreement, "problems": len(group), **_accuracy(group)}
            for agreement, group in sorted(by_agreement.items())
        ],
    }


def write_report(directory: Path, report: dict[str, Any]) -> None:
    """`report.json`, and its efforts, one a line, in `report.csv`."""
    checkpoint.write_json(directory / REPORT_FILE, report)
    rows = []
    for row in report["efforts"]:
        rest = dict(row)
        low, high = rest.pop("interval")
        rows.append({"effort": rest.pop("effort"), "accuracy": rest.pop("accuracy"), "low": low, "high": high} | rest)
    with (directory / CSV_FILE).open("w", newline="", encoding="utf-8") as file:
        columns = dict.fromkeys(name for row in rows for name in row)  # Math-Verify may have judged some efforts only
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def as_table(report: dict[str, Any]) -> str:
    """The report for a person."""
    trained, baseline, votes = report["trained_effort"], report["baseline"], report.get("votes")
    header = ["", "accuracy", "95 % interval", "won", "lost", "p", "tokens", "steps", "seconds"]
    if any("math_verify" in row for row in report["efforts"]):
        header.append("Math-Verify")
    rows = [_cells(f"effort {row['effort']}", row) for row in report["efforts"]]
    if baseline and baseline["name"] == OWN_BACKBONE:
        rows[0] = _cells("effort 0 (baseline)", baseline)
    elif baseline:
        rows.append(_cells(f"baseline: {baseline['name']}", baseline))
    rows += [_cells(f"control: {control['name']}", control) for control in report.get("controls", [])]
    if votes:
        rows.append(_cells(f"effort {votes['effort']}, {votes['samples']} votes", votes))
    lines = _aligned(header, [[*row, ""][: len(header)] for row in rows])
    lines.insert(0, f"{report['dataset']}, seed {report['seed']}, {report['n']} problems, trained effort {trained}\n")
    if baseline:
        lines.append("\nwon, lost: problems that only the effort, or only the baseline, got right")
    if "controls" in report:
        lines.append(f"won, lost of a control: problems that only effort {trained}, or only the control, got right")
    if baseline or "controls" in report:
        lines.append("p: exact McNemar test, corrected for the number of comparisons (Holm)")
    verdicts = ", ".join(f"{count} {by}" for by, count in report["verdicts"].items())
    lines.append(f"\nverdicts: {verdicts}")
    if "operations" in report:
        first = report["operations"][0]
        header = ["right, by operations"]
        header += [f"effort {row['effort']}" for row in first["efforts"]] + [row["name"] for row in first["controls"]]
        rows = [
            [f"{group['operations']} ({group['n']} problems)"]
            + [f"{row['accuracy']:.1%}" for row in (*group["efforts"], *group["controls"])]
            for group in report["operations"]
        ]
        lines += ["", *_aligned(header, rows)]
    return "\n".join(lines)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(cells, widths, strict=True)] for cells in (header, *rows)]
    return ["  ".join([cells[0].strip().ljust(widths[0]), *cells[1:]]) for cells in aligned]


def show_p(p: float) -> str:
    """Two digits; what is too small for a double is not nothing."""
    return f"{p:.2g}" if p else "< 1e-300"


def _cells(label: str, row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    tested = row.get("mcnemar_p") is not None
    return [
        label,
        f"{row['accuracy']:.1%}",
        f"{low:.1%} - {high:.1%}",
        str(row["wins"]) if tested else "",
        str(row["losses"]) if tested else "",
        show_p(row["mcnemar_p"]) if tested else "",
        f"{row['tokens_per_answer']:.1f}",
        f"{row['mean_steps']:.2f}",
        f"{row['seconds_per_answer']:.4f}",
        *([f"{row['math_verify']:.1%}"] if "math_verify" in row else []),
    ]


def _accuracy(right: Sequence[bool]) -> dict[str, Any]:
    return {"accuracy": sum(right) / len(right), "interval": list(wilson_interval(sum(right), len(right)))}


def _took(replies: Sequence[Answer], num_answers: int) -> dict[str, Any]:
    """What the replies cost per answer; mean_steps is supervision steps per token."""
    tokens = sum(reply.tokens for reply in replies)
    return {
        "tokens_per_answer": tokens / num_answers,
        "seconds_per_answer": sum(reply.elapsed_s for reply in replies) / num_answers,
        "mean_steps": sum(reply.steps for reply in replies) / tokens,
    }


def _test(pairs: Sequence[tuple[Sequence[Answer], Sequence[Answer]]]) -> list[dict[str, Any]]:
    """Paired tests of ours against theirs, corrected for their number."""
    results = [paired([a.right for a in ours], [b.right for b in theirs]) for ours, theirs in pairs]
    return [
        {"wins": result.wins, "losses": result.losses, "mcnemar_p": p}
        for result, p in zip(results, holm([result.p for result in results]), strict=True)
    ]
