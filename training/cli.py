"""The training commands: parse, build, call. Nothing runs at import."""

import signal
import sys

from training.config import EvalSettings, PretrainSettings, SampleSettings, TrainSettings
from trm.logs import configure_logging
from trm.settings import run_command


def train() -> None:
    """Entry point of `trm-train`."""
    run_command(_train, TrainSettings.command)


def evaluate() -> None:
    """Entry point of `trm-eval`."""
    run_command(_evaluate, EvalSettings.command)


def sample() -> None:
    """Entry point of `trm-sample`."""
    run_command(_sample, SampleSettings.command)


def pretrain() -> None:
    """Entry point of `trm-pretrain`."""
    run_command(_pretrain, PretrainSettings.command)


def _train() -> None:
    settings = TrainSettings.from_command_line()
    from training import workers
    from training.run import train as run

    configure_logging(workers.log_level())
    last = run(settings)
    if workers.rank() == 0:
        print(last)  # noqa: T201 - the command's result
    workers.leave()


def _evaluate() -> None:
    settings = EvalSettings.from_command_line()
    configure_logging()
    _exit_on_sigterm()
    from training.evaluation.report import as_table
    from training.evaluation.run import evaluate_model

    print(as_table(evaluate_model(settings)))  # noqa: T201 - the command's result


def _sample() -> None:
    settings = SampleSettings.from_command_line()
    configure_logging()
    _exit_on_sigterm()
    from training.sampling.run import sample as run

    print(run(settings))  # noqa: T201 - the command's result


def _exit_on_sigterm() -> None:
    """End as at Ctrl-C, with what is finished kept."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _pretrain() -> None:
    settings = PretrainSettings.from_command_line()
    from training import workers
    from training.pretrain import pretrain as run

    configure_logging(workers.log_level())
    run(settings)
    workers.leave()
