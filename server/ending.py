"""The end of the process, which nothing may hold up.

Python waits at its end for the threads of executors, and asyncio waits for those of its own, both without a limit. One
that hangs, in a tokenizer or in a call of the device, would keep the process for ever.
"""

import logging
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn, Self

logger = logging.getLogger(__name__)

GRACE_S = 6  # for what is left once the last response has been sent: milliseconds, unless a step is long or hangs
WAITING = frozenset(
    {"threading", "concurrent.futures.thread", "asyncio.runners"}
)  # modules whose threads wait for others


class Deadline:
    """A context that ends the process, with status 1 and a message that says what hangs, where it is not left in time.

    There is no limit until `within` sets one.
    """

    def __init__(self) -> None:
        self._at = math.inf
        self._over = False
        self._changed = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="trm-deadline", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True
        self._changed.set()

    def within(self, limit_s: float) -> None:
        """So many seconds are left from now; an earlier limit holds. Signal handlers may call this."""
        self._at = min(self._at, time.monotonic() + limit_s)
        self._changed.set()

    def _watch(self) -> None:
        while not self._over:
            left_s = self._at - time.monotonic()
            if left_s <= 0:
                leave("stopping took too long")
            self._changed.wait(None if left_s == math.inf else left_s)
            self._changed.clear()


def leave(reason: str) -> NoReturn:
    """End the process now, with status 1, whatever its other threads do; the log says where each of them is."""
    logger.critical("%s; exiting although these threads still run: %s", reason, _running())
    os._exit(1)


def _running() -> str:
    """The other threads and their current lines, without those that only wait for another, unless all do."""
    frames = sys._current_frames()
    busy: list[str] = []
    waiting: list[str] = []
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if frame is not None and thread is not threading.current_thread():
            place = f"{thread.name} in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
            (waiting if frame.f_globals.get("__name__") in WAITING else busy).append(place)
    return ", ".join(busy or waiting)
