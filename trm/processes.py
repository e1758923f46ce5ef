"""Processes that a command starts, and ends however it ends itself."""

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def child_process(
    command: Sequence[str], end: Callable[[subprocess.Popen[bytes]], object], **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this command, with `options` of `subprocess.Popen`, until `end` ends it, however the block ends.

    A handler that raises while the process starts would leave one that nobody knows. So SIGTERM and SIGINT wait until
    there is something to end.
    """
    child: subprocess.Popen[bytes] | None = None
    try:
        with _signals_wait():
            child = subprocess.Popen(command, **options)
        yield child
    finally:
        if child is not None:
            end(child)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Handlers of Python's are called after the block for the signals that came in it.

    They run in the main thread, so that in another one there is nothing to wait for. To block the signals themselves
    would not do: a child inherits that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
