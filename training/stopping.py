"""Stop a run in good order: SIGTERM and Ctrl-C ask for it, a second signal does not ask."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NOTICE = b"\nfinishing this optimiser step, then saving; a second signal stops at once\n"


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; from then on, and after the block, signals act as before.

    Outside the main thread, where Python allows no handlers, nothing sets it.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        restore()
        stop.set()
        os.write(2, NOTICE)  # logging is not safe in here

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
