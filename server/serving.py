"""What the routes share: the engine and its bridge, and the record of the request at hand."""

import threading
import time
from dataclasses import dataclass, field, replace
from typing import Annotated, Self

from fastapi import Depends, Request

from server.errors import Unavailable
from server.metrics import Metrics
from server.settings import ServeSettings
from server.token_bytes import TokenBytes
from server.worker import Submission, Worker
from trm.engine.engine import Engine
from trm.engine.grammar import GrammarCompiler
from trm.engine.hosted import Hosted
from trm.errors import UnknownModel

LISTED = 10  # models that an error names


@dataclass
class Call:
    """One HTTP request. Its submission, reserved or running, ends with it: the middleware cancels what is left."""

    id: str
    started_at: float = field(default_factory=time.perf_counter)
    status: int | None = None  # None until a response starts
    answered: bool = False  # the whole response has been sent
    abandoned: bool = False  # the client left before
    submission: Submission | None = None

    def timings_ms(self) -> dict[str, float]:
        """What has taken how long, as far as is known: the way into the queue, the queue, the first token, all."""
        timings = {}
        submission = self.submission
        if submission is not None and submission.submitted_at is not None:
            timings["prepare"] = submission.submitted_at - self.started_at
            if submission.queue_s is not None:
                timings["queue"] = submission.queue_s
            if submission.first_token_at is not None:
                timings["first_token"] = submission.first_token_at - submission.submitted_at
        timings["total"] = time.perf_counter() - self.started_at
        return {name: 1000 * seconds for name, seconds in timings.items()}


@dataclass(frozen=True)
class Serving:
    """What is being served, by the server's own model or by the decoder that a request has chosen.

    may_load: whether decoders may come and go while it runs; `loading` is then held by whoever brings one.
    """

    engine: Engine
    worker: Worker
    metrics: Metrics
    token_bytes: TokenBytes
    grammars: GrammarCompiler
    model_id: str
    decoder: Hosted  # of this id
    settings: ServeSettings
    may_load: bool = False
    loading: threading.Lock = field(default_factory=threading.Lock)

    def reserve(self, call: Call, count: int) -> Submission:
        """`Worker.reserve`, on behalf of an HTTP request."""
        call.submission = self.worker.reserve(count, self.model_id)
        return call.submission

    @property
    def models(self) -> dict[str, Hosted]:
        """Everything that requests may choose now, by its id, the server's own model first."""
        return {name or self.settings.model_id: decoder for name, decoder in list(self.engine.decoders.items())}

    @property
    def decoder_name(self) -> str | None:
        """What the engine calls the decoder."""
        return None if self.model_id == self.settings.model_id else self.model_id

    def choose(self, name: str | None) -> Self:
        """The same with the model of that id, None for the server's own. Raises UnknownModel."""
        if name is None:
            return self
        models = self.models
        if name not in models:
            there = ", ".join(map(repr, list(models)[:LISTED])) + (", …" if len(models) > LISTED else "")
            raise UnknownModel(f"model {name[:200]!r} does not exist; this server has {there}")
        return replace(self, model_id=name, decoder=models[name])


async def _serving_or_none(request: Request) -> Serving | None:
    serving: Serving | None = request.app.state.serving
    return serving


async def _serving(request: Request) -> Serving:
    serving = await _serving_or_none(request)
    if serving is None:
        raise Unavailable("the server is still loading its model; try again in a moment", "starting")
    return serving


async def _call(request: Request) -> Call:
    call: Call = request.state.call
    return call


ServingDep = Annotated[Serving, Depends(_serving)]
ServingOrNoneDep = Annotated[Serving | None, Depends(_serving_or_none)]  # for routes that answer while it starts
CallDep = Annotated[Call, Depends(_call)]
