"""What a run says while it goes: log.jsonl, TensorBoard event files, and the bar on the terminal.

All three show means since the line before. A resumed run cuts what lies beyond its first step, so that
every curve goes on without a gap, a repetition or a fork.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from training.validation import Validation

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
LOG_EVERY = 10  # optimiser steps between lines
PER_STEP = {"losses": "loss", "halting_losses": "halting_loss", "token_accuracies": "token_accuracy"}
REPORT_EVERY_S = 60  # beside the lines of log.jsonl, for steps that take long


class RunLog:
    """A context manager; `step` is the number of optimiser steps already taken, `deepest` the last supervision step.

    Raises OSError on a full disk.
    """

    def __init__(self, run_dir: Path, step: int, total_steps: int, deepest: int) -> None:
        self.run_dir, self.step, self.total_steps, self.deepest = run_dir, step, total_steps, deepest
        self.last: dict[str, Any] = {}  # the line written last
        self._reports: list[dict[str, Any]] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        from torch.utils.tensorboard import SummaryWriter  # of the extra `train`

        _cut(self.run_dir / LOG_FILE, self.step)
        self._file = self._open.enter_context((self.run_dir / LOG_FILE).open("a"))
        self._board = self._open.enter_context(SummaryWriter(self.run_dir, purge_step=self.step + 1))
        self._bar = self._open.enter_context(
            tqdm(total=self.total_steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True)
        )
        if not self._bar.disable:
            self._open.enter_context(above_the_bar())
        self._since = self._started = time.monotonic()
        self._told = -math.inf  # the first step is told at once: how long all of them will take
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def training(self, step: int, report: dict[str, Any], is_last: bool) -> None:
        """One optimiser step: what `Trainer.train_step` returned."""
        self._reports.append(report)
        self._bar.update()
        now = time.monotonic()
        is_due, is_time = is_last or step % LOG_EVERY == 0, now - self._told > REPORT_EVERY_S
        if not is_due and not is_time:
            return
        line = summarise(self._reports, self.deepest) | {"step": step}
        line["tokens_per_s"] = round(line["tokens"] / max(now - self._since, 1e-9), 1)
        self._bar.set_postfix_str(f"loss {line['loss']:.4g}, {line['tokens_per_s']:,.0f} tokens/s")
        if is_time:
            self._tell(step, line, now)
        if not is_due:
            return
        self._write(line)
        curves = {"loss": line["loss"], "gradient_norm": line["grad_norm"], "learning_rate": line["lr"]}
        self._draw(step, {f"training/{name}": value for name, value in curves.items()})
        self._draw(step, {"training/tokens_per_s": line["tokens_per_s"]})
        for name, tag in PER_STEP.items():
            self._draw(step, _by_supervision_step(tag, line[name]))
        self._reports, self._since, self.last = [], now, line

    def validation(self, step: int, measured: Validation) -> None:
        """Losses on problems never trained on."""
        line = {"validation_loss": measured.losses[-1], "validation_losses": measured.losses}
        self._write(line | {"validation_token_accuracies": measured.token_accuracies, "step": step})
        self._draw(step, {"validation/loss": measured.losses[-1]})
        self._draw(step, _by_supervision_step("validation_loss", measured.losses))
        self._draw(step, _by_supervision_step("validation_token_accuracy", measured.token_accuracies))
        logger.info("step %d: validation loss %.4g", step, measured.losses[-1])

    def flush(self) -> None:
        """Everything said so far is on its way to the disk: called before a checkpoint is in place."""
        self._file.flush()
        self._board.flush()

    def pause(self) -> None:
        """Time up to now, spent on saving and measuring, does not count into tokens per second."""
        if not self._reports:
            self._since = time.monotonic()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _draw(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def _tell(self, step: int, line: dict[str, Any], now: float) -> None:
        """A line where there is no terminal for a bar."""
        self._told = now
        if not self._bar.disable:
            return
        left = (now - self._started) / (step - self.step) * (self.total_steps - step)
        logger.info(
            "step %d of %d, loss %.4g, %.0f tokens/s, %s left",
            step,
            self.total_steps,
            line["loss"],
            line["tokens_per_s"],
            tqdm.format_interval(left),
        )


class _AboveTheBar(logging.Handler):
    """Hands records on to `handlers` while the bar is cleared."""

    def __init__(self, handlers: list[logging.Handler]) -> None:
        super().__init__()
        self.handlers = handlers

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode():
            for handler in self.handlers:
                if record.levelno >= handler.level:
                    handler.handle(record)


@contextmanager
def above_the_bar() -> Iterator[None]:
    """Within the block log lines do not run into the bar of a terminal."""
    root = logging.getLogger()
    before = root.handlers
    root.handlers = [_AboveTheBar(before)]
    try:
        yield
    finally:
        root.handlers = before


def summarise(reports: list[dict[str, Any]], deepest: int) -> dict[str, Any]:
    """Means of several reports, per supervision step where they have them; None for a step that none of them took.

    `lr` is the last one, `tokens` the sum: labels that carried a loss.
    """
    line: dict[str, Any] = {
        "loss": _mean([report["loss"] for report in reports]),
        "grad_norm": _mean([report["grad_norm"] for report in reports]),
        "lr": reports[-1]["lr"],
        "tokens": sum(report["tokens"] for report in reports),
    }
    for name in PER_STEP:
        values: list[list[float]] = [[] for _ in range(deepest)]
        for report in reports:
            first = (report["supervision_step"] or 1) - 1
            for index, value in enumerate(report[name], start=first):
                values[index].append(value)
        line[name] = [_mean(each) if each else None for each in values]
    return line


def _mean(values: list[float]) -> float:
    return float(f"{sum(values) / len(values):.6g}")


def _by_supervision_step(tag: str, values: Sequence[float | None]) -> dict[str, float]:
    return {f"{tag}/step_{number:02}": value for number, value in enumerate(values, 1) if value is not None}


def _cut(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a line that a kill has torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
