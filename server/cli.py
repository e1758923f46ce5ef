"""`trm-serve`: parse, take the port, load, serve. Heavy imports wait until the settings are known to be good."""

import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from server.ending import Deadline, leave
from server.settings import ServeSettings
from trm.errors import ConfigError, DeviceError
from trm.logs import configure_logging
from trm.settings import run_command

if TYPE_CHECKING:
    from trm.engine.engine import Engine

logger = logging.getLogger(__name__)

MALLOC_ARENAS = 2
M_ARENA_MAX = -8  # of glibc's malloc.h
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SWITCH_INTERVAL_S = 0.001  # after which the engine gets Python's lock back from a busy event loop; Python's own is 5 ms


def main() -> None:
    """Entry point of `trm-serve`."""
    with stopping_at_once():  # from the start: process 1 of a container ignores signals that it has no handler for
        run_command(_serve, ServeSettings.command)


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Exit with 0 at SIGTERM and Ctrl-C; for while nothing has been accepted."""

    def stop(sig: int, frame: FrameType | None) -> None:
        logger.info("stopping now")
        os._exit(0)  # an exception could land in any library that is being imported

    before = {sig: signal.signal(sig, stop) for sig in SIGNALS}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _serve() -> None:
    settings = ServeSettings.from_command_line()
    configure_logging(settings.log_level.upper(), settings.log_format)
    limit_malloc_arenas()
    with listen(settings.host, settings.port) as sock, Deadline() as deadline:
        serve(settings, sock, deadline)  # the port is taken before loading: an error there should not cost a minute
    logger.info("stopped")


def serve(settings: ServeSettings, sock: socket.socket, deadline: Deadline) -> None:
    """Answer requests on `sock`, while the model loads with 503, until a signal or the engine's failure ends it.

    `deadline` is then set.

    Raises what kept the model from loading, and DeviceError where the engine failed and that is to end the server.
    """
    from server.app import attach, create_app
    from server.draining import DrainingServer

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    app = create_app(None, settings)
    server = DrainingServer(app, settings, deadline.within)
    for sig in SIGNALS:
        signal.signal(sig, server.handle_exit)  # here too: uvicorn gives back what it found, when it is through
    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    failures: list[BaseException] = []

    def load() -> None:
        try:
            engine = load_engine(settings)
            engine.start()
            attach(app, engine)
            gc.collect()
            gc.freeze()  # or each full collection walks through all of torch, while nobody is answered
            logger.info("serving %s on %s", settings.model_id, url)
        except BaseException as error:  # noqa: BLE001 - raised again below; libraries in Rust panic with no Exception
            failures.append(error)
            server.should_exit = True

    threading.Thread(target=load, name="trm-load", daemon=True).start()
    logger.info("loading %s; %s answers 503 until it is loaded", settings.model_id, url)
    server.run(sockets=[sock])
    if failures:
        raise failures[0]
    failure = "the engine failed; see the log above" if server.engine_failed else None
    if not app.state.serving.engine.close():  # its thread hangs, and Python's own end could wait for the device too
        leave(failure or "the engine's last step does not end")
    if failure:
        raise DeviceError(failure)


def limit_malloc_arenas() -> None:
    """Let threads share heaps: glibc gives each its own, and what lies broken up in all of them adds up for hours.

    Does nothing with another C library, or where MALLOC_ARENA_MAX says how many.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, MALLOC_ARENAS)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, on which early clients queue until the server accepts them.

    Raises ConfigError where the address cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.create_server(address[:2], family=family)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it: no token waits for an ACK
        return sock
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error


def load_engine(settings: ServeSettings) -> "Engine":
    """The model and tokenizer that the settings name, in an engine that is not started."""
    from trm import bundled_model_path
    from trm.chat import ChatFormat
    from trm.checkpoint import locate, read_config, read_tokenizer
    from trm.engine.engine import Engine, EngineConfig, host
    from trm.loading import load_beside, load_for_decoding

    source, sources = settings.model or str(bundled_model_path()), settings.decoder_sources()
    model = load_for_decoding(
        source,
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        num_threads=settings.num_threads,
        keep_head=any(not read_config(locate(path)).own_lm_head for path in sources.values()),
    )
    chat = ChatFormat(read_tokenizer(source), normalize=model.config.normalize_text)
    config = EngineConfig(
        max_rows=settings.max_rows,
        max_model_len=settings.max_model_len,
        max_queue=settings.max_queue,
        kv_cache_bytes=settings.kv_cache_bytes,
        prefill_chunk=settings.prefill_chunk,
        row_buckets=tuple(sorted(set(settings.row_buckets))) or None,
        max_draft_tokens=settings.max_draft_tokens,
        max_step_s=settings.max_step_seconds,
    )
    others = {name: host(*load_beside(path, model, chat)) for name, path in sources.items()}
    engine = Engine(model, chat, config, others)
    for name, path in sources.items():
        logger.info("loaded decoder %s from %s", name, path)
    logger.info(
        "loaded %s on %s in %s%s; cache for %d rows of %d positions, %d bytes a position",
        source,
        model.device,
        engine.dtype,
        f" and {settings.quantize}" if settings.quantize else "",
        config.max_rows,
        engine.max_model_len,
        engine.bytes_per_token,
    )
    return engine
