"""Put the HTTP app together: state, routes, errors, middleware. Owns no engine: it is given a started one."""

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from server import errors, openapi
from server.metrics import Metrics
from server.middleware import OPEN_PATHS, HeadAsGet, ReadBody, Record, RequireKey, RootPath
from server.routes import (
    anthropic,
    chat,
    completions,
    decoders,
    models,
    ollama,
    playground,
    responses,
    solve,
    status,
    tokens,
)
from server.serving import Serving
from server.settings import ServeSettings
from server.token_bytes import TokenBytes
from server.worker import Worker
from trm import __version__
from trm.engine.engine import Engine
from trm.engine.grammar import GrammarCompiler
from trm.errors import ConfigError

ROUTES = (anthropic, chat, completions, decoders, models, ollama, playground, responses, solve, status, tokens)


def create_app(engine: Engine | None, settings: ServeSettings, one_of_many: bool = False) -> FastAPI:
    """An app that serves `engine`, or is starting until `attach` gives it one.

    `one_of_many`: requests reach it or another that is its like, and must stay so. Of the settings it reads what
    concerns requests. Raises ConfigError for a root path that is one of its own paths.
    """
    metrics = Metrics()
    app = FastAPI(title="Qwen-TRM", version=__version__, redirect_slashes=False)
    app.state.settings = settings
    app.state.one_of_many = one_of_many
    app.state.metrics = metrics
    app.state.serving = None
    for routes in ROUTES:
        app.include_router(routes.router)
    errors.install(app)
    openapi.install(app)
    _check_root_path(app, settings.root_path)
    add_middleware(app, settings, metrics)
    if engine is not None:
        attach(app, engine)
    return app


def _check_root_path(app: FastAPI, prefix: str) -> None:
    """Whether a proxy has taken the prefix away must show in every path."""
    routes = [*app.routes, *(route for module in ROUTES for route in module.router.routes)]
    for path in (getattr(route, "path", "") for route in routes):
        if prefix and f"{path}/".startswith(f"{prefix}/"):
            raise ConfigError(
                f"--root-path {prefix}: the server's own path {path} begins with it; choose another prefix"
            )


def add_middleware(app: FastAPI, settings: ServeSettings, metrics: Metrics) -> None:
    """What happens around every request, whoever answers it."""
    app.add_middleware(HeadAsGet)  # each one added wraps those before it
    app.add_middleware(ReadBody, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_seconds)
    app.add_middleware(RequireKey, keys=settings.keys(), public=settings.public_paths)
    if settings.root_path:
        app.add_middleware(RootPath, prefix=settings.root_path)
    app.add_middleware(Record, metrics=metrics, quiet={*OPEN_PATHS, "/metrics", *playground.PATHS})
    if settings.cors_origins:  # outermost: a preflight has no key, and pages may read errors and headers too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )


def attach(app: FastAPI, engine: Engine) -> None:
    """From now on the app serves `engine`. May be called from any thread, once."""
    settings: ServeSettings = app.state.settings
    metrics: Metrics = app.state.metrics
    worker = Worker(engine, metrics, settings.request_timeout_seconds)
    metrics.watch(engine, lambda: worker.unavailable() is None)
    token_bytes = TokenBytes(engine.chat.tokenizer)
    app.state.serving = Serving(
        engine=engine,
        worker=worker,
        metrics=metrics,
        token_bytes=token_bytes,
        grammars=GrammarCompiler(token_bytes.texts(engine.model.config.vocab_size), engine.chat.end_id),
        model_id=settings.model_id,
        decoder=engine.decoder(None),
        settings=settings,
        may_load=bool(settings.keys() and settings.decoder_dir) and not app.state.one_of_many,
    )
    for model in app.state.serving.models:
        metrics.of(model)
