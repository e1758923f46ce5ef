"""How the process stops: the first signal drains, the second one cancels what is left."""

import asyncio
import logging
from types import FrameType

import uvicorn

from server.worker import Worker

logger = logging.getLogger(__name__)

LAST_WORDS_S = 5  # for responses that are still on their way when the drain is over


class DrainingServer(uvicorn.Server):
    """A server that, when told to stop, stays open until accepted work is done or `drain_s` is over.

    Meanwhile new work gets its 503 and probes their answer; uvicorn alone would close the port at once.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, drain_s: float) -> None:
        config.timeout_graceful_shutdown = LAST_WORDS_S
        super().__init__(config)
        self._worker = worker
        self._drain_s = drain_s
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal, between any two steps of the main thread; what it asks for happens on the loop."""
        asyncio.get_running_loop().call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._drain is None:
            logger.info("stopping; accepted requests get %g s to finish", self._drain_s)
            self._drain = asyncio.ensure_future(self._finish_work())
        else:
            logger.info("stopping now")
            self._worker.cancel_all()
            self.should_exit = True

    async def _finish_work(self) -> None:
        await self._worker.drain(self._drain_s)
        self.should_exit = True
