"""The training commands: parse, build, call. Nothing runs at import."""

import json
from typing import Any

from training.config import EvalSettings, PretrainSettings, TrainSettings
from trm.settings import configure_logging, run_command


def train() -> None:
    """Entry point of `trm-train`."""
    run_command(_train, TrainSettings.command)


def evaluate() -> None:
    """Entry point of `trm-eval`."""
    run_command(_evaluate, EvalSettings.command)


def pretrain() -> None:
    """Entry point of `trm-pretrain`."""
    run_command(_pretrain, PretrainSettings.command)


def _train() -> None:
    settings = TrainSettings.from_command_line()
    from training import workers
    from training.run import train as run

    configure_logging("INFO" if workers.rank() == 0 else "WARNING")
    last = run(settings)
    if workers.rank() == 0:
        print(last)  # noqa: T201 - the command's result
    workers.leave()


def _evaluate() -> None:
    settings = EvalSettings.from_command_line()
    configure_logging()
    from training.evaluate import evaluate_model

    report = evaluate_model(settings)
    print(f"{report['dataset']}, {report['n']} problems, trained effort {report['trained_effort']}")  # noqa: T201
    print("effort  accuracy  95 % interval    tokens  seconds  against effort 0")  # noqa: T201
    for row in report["efforts"]:
        low, high = row["interval"]
        print(  # noqa: T201
            f"{row['effort']:6} {row['accuracy']:9.1%}  {low:6.1%} - {high:6.1%} "
            f"{row['tokens_per_answer']:8.1f} {row['seconds_per_answer']:8.3f}  {_against(row)}"
        )
    print(json.dumps(report))  # noqa: T201 - the command's result, for machines


def _pretrain() -> None:
    settings = PretrainSettings.from_command_line()
    configure_logging()
    from training.pretrain import pretrain as run

    run(settings)


def _against(row: dict[str, Any]) -> str:
    pair = row.get("against_backbone")
    return f"+{pair['wins']} -{pair['losses']}, p = {pair['p']:.2g}" if pair else ""
