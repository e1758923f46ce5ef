"""The bridge between the event loop and the engine's thread.

Places in the queue are reserved first, then requests are submitted in them as a group, and
their events come back in order as one asynchronous stream per group. Knows no HTTP. Iterating
raises the engine's error when one request of the group fails, TimedOut when their time is
over, and Unavailable when the server stops; whoever stops listening early calls `cancel`.
"""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from server.errors import TimedOut, Unavailable, renamed
from server.metrics import Metrics, ModelMetrics, Times
from trm.engine.engine import Engine
from trm.engine.handle import Handle, Reservation
from trm.engine.request import Event, Reply
from trm.engine.request import Request as EngineRequest
from trm.errors import DeviceError, TRMError

T = TypeVar("T")


class Submission:
    """Reserved places, then the requests in them: `async for index, event in submission`, index as submitted.

    `on_end` is called once nothing is reserved nor running any more.
    """

    def __init__(self, reservation: Reservation, metrics: ModelMetrics, on_end: Callable[["Submission"], None]) -> None:
        self.reservation = reservation
        self.error: TRMError | None = None  # that it ended with
        self.requests: Sequence[EngineRequest] = ()
        self.names: Mapping[str, str] = {}  # of fields that are called otherwise where it was asked for, and how
        self.completion_tokens = 0  # so far
        self.finish_reasons: Counter[str] = Counter()
        self._handles: Sequence[Handle] = ()
        self._metrics = metrics
        self._on_end = on_end
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._stopped = asyncio.Event()
        self.reserved_at = time.perf_counter()
        self.submitted_at: float | None = None
        self.first_token_at: float | None = None  # of any of the requests
        self.queue_s: float | None = None  # the longest of any of the requests, as far as is known
        self._running: set[int] = set()
        self._spared: set[int] = set()
        self._times: list[Times] = []

    @property
    def running(self) -> bool:
        """Whether the engine keeps places for it or owes it a final event."""
        return bool(self.reservation.count or self._running)

    @property
    def prompt_tokens(self) -> int:
        """Of all requests together."""
        return sum(len(request.prompt_ids) for request in self.requests)

    def begin(self, requests: Sequence[EngineRequest], handles: Sequence[Handle]) -> None:
        """The engine has accepted these requests; what follows are their events."""
        self.requests = requests
        self._handles = handles
        self._running = set(range(len(handles)))
        self._times = [Times(self.reserved_at) for _ in handles]
        self.submitted_at = time.perf_counter()

    def cancel(self) -> None:
        """Give back what is reserved and let go of every request that has not ended; none that has is touched."""
        if self.reservation.count:
            self.reservation.release()
            self._on_end(self)
        for index in self._running:
            self._handles[index].cancel()

    def stop(self, error: TRMError) -> None:
        """Cancel from the server's side: whoever listens gets `error` after the events so far."""
        self.error = error
        self._stopped.set()
        self._events.put_nowait((0, Event(finish_reason="error", error=error)))
        self.cancel()

    async def prepare(self, work: Coroutine[None, None, T]) -> T:
        """What `work` for its requests returns. Raises what stops the submission before: a thread may never return."""
        working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((working, stopped), return_when=asyncio.FIRST_COMPLETED)
            if self.error is not None:
                raise self.error
            return working.result()
        finally:
            working.cancel()  # nothing happens to one that is done
            stopped.cancel()
            del working  # it holds what it raised, which holds this frame, and all that was read of the request

    def spare(self, indexes: Iterable[int]) -> None:
        """Cancel some requests whose replies are not needed any more; the others go on, and iterating too."""
        self._spared.update(indexes)
        for index in self._running & self._spared:
            self._handles[index].cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        left = len(self._handles)
        while left:
            index, event = await self._events.get()
            if event.finish_reason == "error":
                self.error = event.error or DeviceError("the engine gave up the request")
                with renamed(self.names):
                    raise self.error
            if event.finish_reason == "cancelled" and index not in self._spared:
                raise Unavailable("the server is stopping and ended the request; send it again", "draining")
            left -= event.finish_reason is not None
            yield index, event

    async def progress(self) -> AsyncIterator[tuple[int, Event, Reply | None]]:
        """Events as they come, the final one of each request with its whole reply."""
        events: list[list[Event]] = [[] for _ in self._handles]
        async for index, event in self:
            events[index].append(event)
            yield index, event, None if event.finish_reason is None else Reply.of(events[index])

    async def replies(self) -> list[Reply]:
        """Every reply whole, in order of submission."""
        done = {index: reply async for index, _, reply in self.progress() if reply is not None}
        return [done[index] for index in sorted(done)]

    def deliver(self, index: int, event: Event, at: float) -> None:
        """Take one event, given at time `at`; runs on the loop."""
        self._metrics.record(event, self._times[index], at)
        if event.token_ids:
            self.first_token_at = self.first_token_at or at
            self.completion_tokens += len(event.token_ids)
        if event.usage is not None:
            self.queue_s = max(self.queue_s or 0.0, event.usage.queue_s)
        self._events.put_nowait((index, event))
        if event.finish_reason is not None:
            self.finish_reasons[event.finish_reason] += 1
            self._running.discard(index)
            if not self._running:
                self._on_end(self)


class Worker:
    """Submits to the engine, and knows what is under way. `timeout_s`: how long that may take, 0 for no limit."""

    def __init__(self, engine: Engine, metrics: Metrics, timeout_s: float = 0) -> None:
        self.draining = False
        self._engine = engine
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._timers: dict[Submission, asyncio.TimerHandle | None] = {}  # of what is under way
        self._idle = asyncio.Event()
        self._idle.set()
        self._arrived: deque[tuple[Submission, int, Event, float]] = deque()
        self._woken = False  # the loop will look at what has arrived

    def reserve(self, count: int, model: str) -> Submission:
        """Keep places for so many requests of a model, all or none, until `submit` or the submission's `cancel`.

        Called on the event loop, as all of this; does not wait. Raises Unavailable while stopping or after
        the device failed, and what `Engine.reserve` raises.
        """
        if (reason := self.unavailable()) is not None:
            raise reason
        with _unavailable():
            submission = Submission(self._engine.reserve(count), self._metrics.of(model), self._forget)
        timer = None
        if self._timeout_s:
            timer = asyncio.get_running_loop().call_later(self._timeout_s, self._expire, submission)
        self._timers[submission] = timer
        self._idle.clear()
        return submission

    def submit(self, submission: Submission, requests: Sequence[EngineRequest]) -> None:
        """Hand requests to the engine in the reserved places, all or none.

        Raises what has ended the submission meanwhile, Unavailable after the device failed, and what
        `Engine.submit` raises.
        """
        if submission.error is not None:
            raise submission.error
        loop = asyncio.get_running_loop()

        def on_event(index: int, event: Event) -> None:
            self._arrived.append((submission, index, event, time.perf_counter()))
            if not self._woken:  # one wake-up for all that a step brings; whatever comes before it is seen by it
                self._woken = True
                with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                    loop.call_soon_threadsafe(self._deliver)

        with _unavailable():
            submission.begin(requests, self._engine.submit(requests, on_event, submission.reservation))

    def unavailable(self) -> Unavailable | None:
        """Why no work can be taken, None while it can."""
        if not self._engine.alive():
            return _engine_lost()
        if self.draining:
            return Unavailable("the server is stopping and takes no new work; try again later", "draining")
        return None

    async def drain(self, timeout_s: float) -> None:
        """Take no more work, let what is under way finish for `timeout_s`, end the rest with Unavailable."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s if self._engine.alive() else 0):  # nothing will finish without it
                await self._idle.wait()
        except TimeoutError:
            for submission in list(self._timers):
                submission.stop(Unavailable("the server is stopping and ended the request; send it again", "draining"))

    def give_up(self) -> None:
        """Tell whoever waits that the engine is lost; one that hangs does not."""
        for submission in list(self._timers):
            if submission.error is None:
                submission.stop(_engine_lost())

    def _expire(self, submission: Submission) -> None:
        submission.stop(
            TimedOut(
                f"the request took longer than {self._timeout_s:g} s, this server's limit (--request-timeout-seconds); "
                "ask for fewer tokens or samples, or try again when the server has less to do"
            )
        )

    def _deliver(self) -> None:
        self._woken = False
        while self._arrived:
            submission, index, event, at = self._arrived.popleft()
            submission.deliver(index, event, at)

    def _forget(self, submission: Submission) -> None:
        timer = self._timers.pop(submission)
        if timer is not None:
            timer.cancel()
        if not self._timers:
            self._idle.set()


def _engine_lost() -> Unavailable:
    return Unavailable("the engine has stopped; restart the server", "device_failed")


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    """An engine that is closed, or died just now, is as unavailable as one that is seen to be."""
    try:
        yield
    except DeviceError as error:
        raise Unavailable(str(error), "device_failed") from error
