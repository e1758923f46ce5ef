"""How connections and the process end.

The first signal drains, the second one exits at once; an engine that died may end the process too.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from server.ending import GRACE_S
from server.http_protocol import HttpProtocol
from server.serving import Serving
from server.settings import ServeSettings

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LAST_WORDS_S = 5  # for responses that are still on their way when the drain is over


class DrainingServer(uvicorn.Server):
    """A server that, when told to stop, stays open until accepted work is done or its time is over.

    Meanwhile new work gets its 503 and probes their answer; uvicorn alone would close the port at once.
    With `settings.exit_on_failure` it also stops, with `engine_failed` set, when the engine has died. `ends_within` is
    told, as soon as it stops, in how many seconds the process should be over whatever hangs; `Deadline.within`, say.
    """

    def __init__(
        self, app: FastAPI, settings: ServeSettings, ends_within: Callable[[float], None] = lambda limit_s: None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=partial(HttpProtocol, metrics=app.state.metrics),  # type: ignore[arg-type]  # called, no more
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=settings.idle_connection_seconds,
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
        super().__init__(config)
        self.engine_failed = False
        self._lost = False  # the engine, as of the last look
        self._app = app
        self._drain_s = settings.drain_seconds
        self._exit_on_failure = settings.exit_on_failure
        self._ends_within = ends_within
        self._drain: asyncio.Task[None] | None = None
        self._stopping = False
        self._idle_since: dict[tuple[Any, Any, int], float] = {}

    @property
    def _serving(self) -> Serving | None:
        serving: Serving | None = self._app.state.serving
        return serving

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal, between any two steps of the main thread; what it asks for happens on the loop."""
        again = self._stopping or self.should_exit
        if again or self._serving is None:  # while the model loads there is nothing to finish
            logger.info("stopping now")
            os._exit(128 + sig if again else 0)
        self._stopping = True
        self._ends_within(self._drain_s + LAST_WORDS_S + GRACE_S)
        asyncio.get_running_loop().call_soon_threadsafe(self._stop, self._serving)

    def _stop(self, serving: Serving) -> None:
        logger.info("stopping; accepted requests get %g s to finish, a second signal exits at once", self._drain_s)
        self._drain = asyncio.ensure_future(self._finish_work(serving))

    async def _finish_work(self, serving: Serving) -> None:
        await serving.worker.drain(self._drain_s)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn when the main loop is over."""
        self.should_exit = True
        self._ends_within(LAST_WORDS_S + GRACE_S)
        await super().shutdown(sockets)
        self._ends_within(GRACE_S)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends the server."""
        if self._serving is not None:
            lost = not self._serving.engine.alive()
            if lost and self._lost:  # an engine that died has had a tenth of a second to tell everybody itself
                self._serving.worker.give_up()
                self.engine_failed = self._exit_on_failure
            self._lost = lost
        if counter % 10 == 0:
            self._close_idle()
        return await super().on_tick(counter) or self.engine_failed

    def _close_idle(self) -> None:
        """Close connections that have been without a whole request for too long, or read nothing for as long.

        Uvicorn's own timer runs only after a response, and only until the next byte; what is not read it would keep
        for as long as the client likes.
        """
        now = time.monotonic()
        idle: set[tuple[Any, Any, int]] = set()
        for connection in self.server_state.connections:
            cycle = getattr(connection, "cycle", None)  # of the latest request
            unread = _unread(connection.transport)
            if unread or cycle is None or cycle.response_complete:
                idle.add((connection, cycle, unread))
        self._idle_since = {key: self._idle_since.get(key, now) for key in idle}
        for (connection, _, unread), since in self._idle_since.items():
            if now - since > self.config.timeout_keep_alive:
                if unread:
                    connection.transport.abort()  # an orderly end would wait for the client to read
                else:
                    connection.shutdown()


def _unread(transport: Any) -> int:
    """Bytes that a client has yet to take, the kernel's included; 0 where the kernel has room for all.

    The kernel's go down with every piece that is read, ours only when it has room for a lot.
    """
    ours = int(transport.get_write_buffer_size())
    kernels = bytes(4)
    if ours and fcntl and termios:
        with contextlib.suppress(OSError):  # another system's sockets do not tell
            kernels = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, kernels)
    return ours + int(struct.unpack("i", kernels)[0])
