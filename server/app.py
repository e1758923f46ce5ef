"""Put the HTTP app together: state, routes, errors, middleware. Owns no engine: it is given a started one."""

import time

from fastapi import FastAPI

from server import errors, openapi
from server.metrics import Metrics
from server.middleware import ReadBody, RequireKey, Trace
from server.routes import chat, completions, models, solve, status, tokens
from server.serving import Serving
from server.settings import ServeSettings
from server.token_bytes import TokenBytes
from server.worker import Worker
from trm.engine.engine import Engine


def create_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """An app that serves `engine`; of the settings it reads what concerns requests."""
    metrics = Metrics(engine)
    app = FastAPI(title="Qwen-TRM", redirect_slashes=False)
    app.state.serving = Serving(
        engine=engine,
        worker=Worker(engine, metrics),
        metrics=metrics,
        token_bytes=TokenBytes(engine.chat.tokenizer),
        model_id=settings.model_id,
        settings=settings,
        created=int(time.time()),
    )
    for routes in (chat, completions, models, solve, status, tokens):
        app.include_router(routes.router)
    errors.install(app)
    openapi.install(app, engine, settings)
    app.add_middleware(ReadBody, max_bytes=settings.max_body_bytes)  # each one added wraps those before it
    app.add_middleware(RequireKey, keys=settings.api_key)
    app.add_middleware(Trace, metrics=metrics)
    return app
