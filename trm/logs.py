"""How commands log: lines for people, or JSON for machines. Libraries only log.

What a record carries besides its message (`extra=`) follows it as `key=value`, or becomes keys of
the JSON object; so each fact of a request has a name of its own and nobody parses sentences.
"""

import json
import logging
import os
import re
import select
import sys
import threading
from datetime import UTC, datetime
from typing import Any, Literal

import wrapt

LogFormat = Literal["auto", "text", "json"]

_ORDINARY = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "color_message",
}  # the last is uvicorn's
_PATIENCE_S = 1  # with a pipe whose reader is slow; once only, until it reads again
_PIECE_BYTES = 4096  # what a pipe that can be written to is sure to take at once
_PLAIN = re.compile(r"[\w./:%+-]+")


def configure_logging(level: str = "INFO", log_format: LogFormat = "text") -> None:
    """What a command does once. Level in capitals; "auto" is text on a terminal, else JSON."""
    for library in ("huggingface_hub", "transformers"):  # which may be imported later, or never
        wrapt.register_post_import_hook(_take_over, f"{library}.utils.logging")
    handler = LineHandler(sys.stderr.fileno())
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(True)
    if as_json:
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda failure: _log_uncaught(failure.exc_type, failure.exc_value, failure.exc_traceback)


class LineHandler(logging.Handler):
    """Writes each record to a file descriptor at once.

    What cannot be written, because a disk is full or nobody reads a pipe, is lost, and its command goes on; the
    next record that can be written follows one that says how many were lost. The library's own handler would wait for
    the reader, or print a traceback to the same place and leave pieces of it there once there is room again.
    """

    def __init__(self, file: int) -> None:
        super().__init__()
        self._file = file
        self._lost = 0
        self._torn = False  # the last line is not whole

    def emit(self, record: logging.LogRecord) -> None:
        """Called under the handler's lock."""
        try:
            line = self.format(record)
            if self._lost:
                message = f"{self._lost} records before this one could not be written and are lost"
                line = self.format(logging.LogRecord(__name__, logging.WARNING, "", 0, message, (), None)) + "\n" + line
            self._write(("\n" if self._torn else "") + line + "\n")
            self._lost = 0
        except OSError:
            self._lost += 1
        except Exception:  # noqa: BLE001 - a record that cannot be formatted; told of on standard error
            self.handleError(record)

    def _write(self, text: str) -> None:
        data = text.encode(errors="backslashreplace")
        while data:
            if not select.select([], [self._file], [], 0 if self._lost else _PATIENCE_S)[1]:
                raise BlockingIOError
            written = os.write(self._file, data[:_PIECE_BYTES])
            data = data[written:]
            self._torn = bool(data)


class TextFormatter(logging.Formatter):
    """One line: time, level, logger, message, and what else the record carries."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without its traceback."""
        extra = (f" {name}={_plain(value)}" for name, value in _extra(record).items())
        return super().formatMessage(record) + "".join(extra)


class JsonFormatter(logging.Formatter):
    """One JSON object: time (UTC), level, logger, message, what else the record carries, and exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The object in one line of ASCII."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _take_over(library_logging: Any) -> None:
    """Let a library of the Hugging Face family log through ours, without its own handler and progress bars."""
    library_logging.get_logger()
    library_logging.enable_propagation()
    logging.getLogger(library_logging.__name__.partition(".")[0]).handlers.clear()
    if hasattr(library_logging, "disable_progress_bar"):
        library_logging.disable_progress_bar()


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _ORDINARY}


def _plain(value: Any) -> str:
    """A value that cannot be taken for the end of its line or the start of another field."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(value, default=str)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: Any) -> None:
    logging.getLogger(__name__).critical("uncaught exception", exc_info=(kind, error, traceback))  # type: ignore[arg-type]
