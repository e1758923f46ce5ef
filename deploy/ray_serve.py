"""trm-serve's application on more than one machine: Ray Serve routes, replaces and scales, N decoders decode.

    serve run ray_serve:build max_rows=16            with this folder on PYTHONPATH; deploy/kubernetes/rayservice.yaml

`Decoder` runs the whole application of `server.app` around an engine of its own. `Entrance` has no engine: it checks
keys, reads bodies and sends each request through Ray's handle, which knows how busy each decoder is and queues what
none has room for. What Ray does not do, and so is done here, is to send a request again when the decoder that had it
dies. That is safe until the client has been sent something: a reply depends on nothing but its request, and nobody has
seen it. So a response that does not stream is held until it is whole; a stream whose decoder dies ends with an error
event and [DONE].

Settings are those of `trm-serve`: arguments of the application beat TRM_... in the environment of Ray's nodes.
Replicas, autoscaling and the address belong to Ray's configuration. `build` raises ConfigError for an argument that is
wrong or Ray's.
"""

import asyncio
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import errors
from server.app import add_middleware, create_app
from server.cli import SWITCH_INTERVAL_S, load_engine
from server.errors import TimedOut, Unavailable, problem_of
from server.metrics import Metrics
from server.paths import path_below
from server.schemas.status import StatusBody
from server.serving import Call
from server.settings import ServeSettings
from server.streaming import OLLAMA, OPENAI, framing
from trm.errors import ConfigError, DeviceError, Overloaded
from trm.logs import configure_logging

logger = logging.getLogger(__name__)

RAYS_OWN = frozenset({"host", "port", "root_path", "idle_connection_seconds", "exit_on_failure"})
LOST = (RayActorError, ObjectLostError)  # the process has died, or its machine with all that it held
MAX_DECODERS_TRIED = 3  # a request that kills whoever decodes it must not go through all of them
MAX_OPEN_REQUESTS = 10_000  # of one entrance; those that no decoder has room for wait in max_queued_requests
BROADCAST_TIMEOUT_S = 5
SENT = ("type", "http_version", "scheme", "method", "path", "raw_path", "query_string", "root_path", "client", "server")
"""What of a request's ASGI scope goes to a decoder, besides the headers: the rest cannot leave its process."""


@serve.deployment(health_check_period_s=2)
class Decoder:
    """One engine, and the application around it. Ray sends it work once its constructor is through."""

    def __init__(self, settings: ServeSettings) -> None:
        configure_logging(settings.log_level.upper(), settings.log_format)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._engine = load_engine(settings)
        self._engine.start()
        self._app = create_app(self._engine, settings, one_of_many=True)
        gc.collect()
        gc.freeze()

    async def respond(self, request: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """The response as ASGI messages, as many at a time as there are.

        Closing the iterator is the client's leaving. A decoder that has lost its engine dies, as `trm-serve
        --exit-on-failure` does, rather than be quick to refuse: its requests go to others.
        """
        async for messages in run(self._app, request, body):
            if not self._engine.alive():
                logger.error("the engine has stopped; this replica exits, and Ray starts another")
                os._exit(1)
            yield messages

    async def ready(self) -> bool:
        """Whether it takes work."""
        return self._engine.alive()

    async def exposition(self) -> tuple[str, bytes]:
        """The replica's name and its metrics in Prometheus' text format."""
        return serve.get_replica_context().replica_tag, self._app.state.metrics.exposition()

    def check_health(self) -> None:
        """Called by Ray; raising has the replica replaced."""
        if not self._engine.alive():
            raise DeviceError("the engine has stopped")

    def __del__(self) -> None:
        """Called by Ray when the replica has finished its work, or its time for that is over."""
        self._engine.close()


@serve.deployment(num_replicas=1, max_ongoing_requests=MAX_OPEN_REQUESTS, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Entrance:
    """Takes every request; `/health` is its own, `/ready` and `/metrics` speak for all decoders."""

    def __init__(self, decoders: DeploymentHandle[Any], settings: ServeSettings) -> None:
        configure_logging(settings.log_level.upper(), settings.log_format)
        self._decoders = decoders
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        respond = self._decoders.options(method_name="respond", stream=True)
        app = FastAPI(openapi_url=None, redirect_slashes=False)
        errors.install(app)
        add_middleware(app, self._settings, Metrics())  # what it refuses itself, Ray counts by status

        @app.get("/health")
        async def health() -> StatusBody:
            return StatusBody(status="ok")

        @app.get("/ready")
        async def ready() -> StatusBody:
            if True not in await self._ask_all("ready"):
                raise Unavailable("no replica takes work now", "starting")
            return StatusBody(status="ready")

        @app.get("/metrics")
        async def metrics() -> Response:
            parts = dict(await self._ask_all("exposition"))
            return Response(merge_expositions(parts), media_type=CONTENT_TYPE_LATEST)

        app.mount("/", Forward(respond.remote, self._settings.request_timeout_seconds))
        return app

    async def _ask_all(self, method: str) -> list[Any]:
        """What the decoders say that are alive."""
        try:
            response = self._decoders.broadcast(method)
            answers = await response.results_async(timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError) as error:
            raise Unavailable("no replica answers", "starting") from error
        return [answer for answer in answers if not isinstance(answer, BaseException)]


class Forward:
    """An ASGI application that has each request answered by a decoder.

    `respond` yields the messages of the response, or raises what Ray raises. `timeout_s`: how long to wait for the
    first of them, Ray's queue included; 0 for no limit. After that the decoder's own limit holds.
    """

    def __init__(self, respond: Callable[..., DeploymentResponseGenerator[Any]], timeout_s: float) -> None:
        self._respond = respond
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call: Call = scope["state"]["call"]
        headers = MutableHeaders(raw=list(scope["headers"]))
        headers["X-Request-Id"] = call.id
        request = {name: scope[name] for name in SENT if name in scope} | {"headers": headers.raw}
        body = (await receive())["body"]  # whole: the middleware has read it
        try:
            async with asyncio.timeout(self._timeout_s or None) as patience:
                for _ in range(MAX_DECODERS_TRIED):
                    if await self._answered(request, body, send, call, patience):
                        return
        except BackPressureError as error:
            raise Overloaded("every replica is busy and the queue is full; try again later") from error
        except DeploymentUnavailableError as error:
            raise Unavailable("the replicas cannot be started; see Ray's log", "starting") from error
        except TimeoutError:
            raise TimedOut(f"no replica answered within {self._timeout_s:g} s, this server's limit") from None
        raise Unavailable(f"{MAX_DECODERS_TRIED} replicas died with this request, one after the other", "replica_lost")

    async def _answered(
        self, request: dict[str, Any], body: bytes, send: Send, call: Call, patience: asyncio.Timeout
    ) -> bool:
        """Pass one decoder's response on; False if it died before anything of it was sent."""
        response = self._respond(request, body)
        held: list[Message] = []
        streaming = False
        try:
            async for messages in response:
                patience.reschedule(None)
                held += messages
                streaming = streaming or _is_stream(held[0])
                if streaming or _ends(held[-1]):
                    for message in held:
                        await send(message)
                    held = []
        except LOST as error:
            logger.warning("request %s: its replica died: %s", call.id, " ".join(str(error).split()))
            if streaming:
                lost = Unavailable("the replica that had this request died; send it again", "replica_lost")
                api = framing(path_below(request))
                await send({"type": "http.response.body", "body": api.frame(api.error(problem_of(lost))) + api.end})
            return streaming
        finally:
            response.cancel()  # a client that left, first of all; nothing happens to a response that is whole
        return True


def _is_stream(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith((OPENAI.media_type, OLLAMA.media_type))


def _ends(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


async def run(app: ASGIApp, request: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
    """The messages that `app` answers with, as many at a time as there are; closing the iterator disconnects it."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    pending = [body]

    async def receive() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    handler = asyncio.ensure_future(app({**request, "asgi": {"version": "3.0"}}, receive, messages.put))
    handler.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        last = False
        while not last:
            some = [await messages.get()]
            while not messages.empty():
                some.append(messages.get_nowait())
            last = some[-1] is None
            if known := [message for message in some if message is not None]:
                yield known
    finally:
        left.set()
        await asyncio.wait([handler])
    handler.result()


class _Families(Collector):
    """Metrics that are already there."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merge_expositions(texts: Mapping[str, bytes]) -> bytes:
    """Prometheus' text of all replicas, by name, as one: each sample gets the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for part in text_string_to_metric_families(text.decode()):
            whole = families.setdefault(part.name, Metric(part.name, part.documentation, part.type))
            whole.samples += [sample._replace(labels={**sample.labels, "replica": replica}) for sample in part.samples]
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)


def build(args: dict[str, Any]) -> serve.Application:
    """The application; `args` are settings of `trm-serve`. Ray's configuration overrides what is said here of scale."""
    if taken := sorted(RAYS_OWN & args.keys()):
        raise ConfigError(f"{', '.join(taken)}: not for Ray Serve, which has its own; remove it")
    settings = ServeSettings.create(args)
    settings.keys()  # now, before a model is loaded
    decoder = Decoder.options(
        ray_actor_options={"num_cpus": settings.num_threads or 1, "num_gpus": int(settings.device == "cuda")},
        max_ongoing_requests=settings.max_rows,  # more would wait in one decoder while another has room
        max_queued_requests=max(1, settings.max_queue),  # Ray knows no 0
        autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": settings.max_rows},
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    entrance = Entrance.options(graceful_shutdown_timeout_s=settings.drain_seconds)
    return entrance.bind(decoder.bind(settings), settings)
