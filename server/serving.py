"""What the routes share: the engine and its bridge, and the record of the request at hand."""

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from server.errors import UnknownModel
from server.metrics import Metrics
from server.settings import ServeSettings
from server.token_bytes import TokenBytes
from server.worker import Submission, Worker
from trm.engine.engine import Engine
from trm.engine.request import Request as EngineRequest


@dataclass
class Call:
    """One HTTP request. Its submission ends with it: the middleware cancels what is left."""

    id: str
    started_at: float = field(default_factory=time.perf_counter)
    status: int | None = None  # None until a response starts
    submission: Submission | None = None

    def timings_ms(self) -> dict[str, float]:
        """What has taken how long, as far as is known: parsing and tokenising, waiting for a token, all of it."""
        timings = {}
        if self.submission is not None:
            timings["prepare"] = self.submission.submitted_at - self.started_at
            if self.submission.first_token_at is not None:
                timings["first_token"] = self.submission.first_token_at - self.submission.submitted_at
        timings["total"] = time.perf_counter() - self.started_at
        return {name: 1000 * seconds for name, seconds in timings.items()}


@dataclass(frozen=True)
class Serving:
    """One model being served."""

    engine: Engine
    worker: Worker
    metrics: Metrics
    token_bytes: TokenBytes
    model_id: str
    settings: ServeSettings
    created: int  # unix time

    def submit(self, call: Call, requests: list[EngineRequest]) -> Submission:
        """`Worker.submit`, on behalf of an HTTP request."""
        call.submission = self.worker.submit(requests)
        return call.submission

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModel unless `name` is the served model, or None for it."""
        if name not in (None, self.model_id):
            message = f"model {name[:200]!r} does not exist; this server has {self.model_id!r}"
            raise UnknownModel(message, param="model", code="model_not_found")


async def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


async def _call(request: Request) -> Call:
    call: Call = request.state.call
    return call


ServingDep = Annotated[Serving, Depends(_serving)]
CallDep = Annotated[Call, Depends(_call)]
