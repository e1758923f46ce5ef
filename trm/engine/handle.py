"""What callers hold: places in the queue, then requests that were accepted, and the way to leave."""

import queue
from collections.abc import Callable, Iterator

from trm.engine.detokenizer import TextStream
from trm.engine.hosted import Hosted
from trm.engine.prefix import Prefix
from trm.engine.request import Event, Reply, Request
from trm.engine.row import Row
from trm.errors import TRMError


class Reservation:
    """Places in the queue, kept until requests are submitted in them or they are given back."""

    def __init__(self, count: int, give_back: Callable[["Reservation"], None]) -> None:
        self.count = count  # 0 once it is used up
        self._give_back = give_back

    def release(self) -> None:
        """Give the places back. Harmless when they are used up."""
        self._give_back(self)


class Handle:
    """One accepted request: its events, its whole reply, and the way to leave.

    Events go to `on_event` in the engine's thread where one was given, else they wait here.
    """

    def __init__(
        self,
        request: Request,
        decoder: Hosted,
        steps: int,
        stream: TextStream,
        prefix: Prefix,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.request = request
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listened = on_event is not None
        self._ended: tuple[Reply, TRMError | None] | None = None
        self.row = Row(request, decoder, steps, on_event or self._events.put, stream, prefix)

    def cancel(self) -> None:
        """Leave before the next tick; the final event then says "cancelled". Harmless afterwards."""
        self.row.cancelled = True

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, the final one last; to be walked through once."""
        if self._listened:
            raise RuntimeError("the events of this request go to its listener")
        while True:
            event = self._events.get()
            yield event
            if event.finish_reason is not None:
                return

    def result(self) -> Reply:
        """Wait for the end. Raises the request's error where it failed. Not after iterating."""
        if self._ended is None:
            events = list(self)
            self._ended = Reply.of(events), events[-1].error
        reply, error = self._ended
        if error is not None:
            raise error
        return reply
