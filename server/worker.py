"""The bridge between the event loop and the engine's thread.

Requests go down in groups that are accepted or refused whole; their events come back
through `call_soon_threadsafe`, in order, as one asynchronous stream per group. Knows no
HTTP. Iterating raises the engine's error when one request of the group fails, and
Unavailable when the server cancels it; whoever stops iterating early calls `cancel`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence

from server.errors import Unavailable
from server.metrics import Metrics
from trm.engine.engine import Engine
from trm.engine.handle import Handle
from trm.engine.request import Event, Reply
from trm.engine.request import Request as EngineRequest
from trm.errors import DeviceError


class Submission:
    """A group of accepted requests: `async for index, event in submission`, index as submitted."""

    def __init__(self, requests: Sequence[EngineRequest], metrics: Metrics) -> None:
        self.handles: Sequence[Handle] = ()
        self.prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        self.completion_tokens = 0  # so far
        self._metrics = metrics
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._running = set(range(len(requests)))
        self._spared: set[int] = set()
        self._submitted_at = time.perf_counter()
        self._last_tokens_at: list[float | None] = [None] * len(requests)

    @property
    def running(self) -> bool:
        """Whether the engine still owes a final event."""
        return bool(self._running)

    def cancel(self) -> None:
        """Let go of every request that has not ended; none that has is touched."""
        for index in self._running:
            self.handles[index].cancel()

    def spare(self, indexes: Iterable[int]) -> None:
        """Cancel some requests whose replies are not needed any more; the others go on, and iterating too."""
        self._spared.update(indexes)
        for index in self._running & self._spared:
            self.handles[index].cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        left = len(self._last_tokens_at)
        while left:
            index, event = await self._events.get()
            if event.finish_reason == "error":
                raise event.error or DeviceError("the engine gave up the request")
            if event.finish_reason == "cancelled" and index not in self._spared:
                raise Unavailable("the server is stopping and ended the request; send it again", "draining")
            left -= event.finish_reason is not None
            yield index, event

    async def progress(self) -> AsyncIterator[tuple[int, Event, Reply | None]]:
        """Events as they come, the final one of each request with its whole reply."""
        events: list[list[Event]] = [[] for _ in self._last_tokens_at]
        async for index, event in self:
            events[index].append(event)
            yield index, event, None if event.finish_reason is None else Reply.of(events[index])

    async def replies(self) -> list[Reply]:
        """Every reply whole, in order of submission."""
        done = {index: reply async for index, _, reply in self.progress() if reply is not None}
        return [done[index] for index in sorted(done)]

    def deliver(self, index: int, event: Event, at: float) -> None:
        """Take one event, given at time `at`; runs on the loop."""
        last = self._last_tokens_at[index]
        self._metrics.record(event, at - self._submitted_at, None if last is None else at - last)
        if event.token_ids:
            self._last_tokens_at[index] = at
            self.completion_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self._running.discard(index)
        self._events.put_nowait((index, event))


class Worker:
    """Submits to the engine, and knows what is under way."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.draining = False
        self._engine = engine
        self._metrics = metrics
        self._submissions: set[Submission] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, requests: Sequence[EngineRequest]) -> Submission:
        """Hand requests to the engine, all or none. Called on the event loop; does not wait.

        Raises Unavailable while stopping or after the device failed, and what `Engine.submit` raises.
        """
        self.check_available()
        loop = asyncio.get_running_loop()
        submission = Submission(requests, self._metrics)

        def on_event(index: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                loop.call_soon_threadsafe(self._deliver, submission, index, event, time.perf_counter())

        try:
            submission.handles = self._engine.submit(requests, on_event)
        except DeviceError as error:
            raise Unavailable(str(error), "device_failed") from error
        self._submissions.add(submission)
        self._idle.clear()
        return submission

    def check_available(self) -> None:
        """Raise Unavailable unless work can be taken."""
        if not self._engine.alive():
            raise Unavailable("the engine has stopped; restart the server", "device_failed")
        if self.draining:
            raise Unavailable("the server is stopping and takes no new work", "draining")

    async def drain(self, timeout_s: float) -> None:
        """Take no more work, let what is under way finish for `timeout_s`, cancel the rest."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            self.cancel_all()

    def cancel_all(self) -> None:
        """Let go of everything under way; whoever waits for it gets Unavailable."""
        for submission in self._submissions:
            submission.cancel()

    def _deliver(self, submission: Submission, index: int, event: Event, at: float) -> None:
        submission.deliver(index, event, at)
        if not submission.running:
            self._submissions.discard(submission)
            if not self._submissions:
                self._idle.set()
