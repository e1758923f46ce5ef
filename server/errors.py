"""Errors as HTTP: the one place that knows status codes.

Every error leaves as OpenAI's `{"error": {"message", "type", "param", "code"}}`, or in the shape of the API that was
asked (`shape`). What is raised on purpose (TRMError) keeps its message; anything else becomes a bare 500, and the
traceback goes to the log only.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from server.paths import path_below
from trm.errors import BadRequest, DeviceError, InternalError, Overloaded, TRMError, UnknownModel

MAX_PATH_CHARS = 200  # of a client's own field name in a message
NO_OBJECT = {"dict_type", "model_type", "model_attributes_type"}  # of pydantic's, which speaks of dictionaries
INSTEAD = {  # of vLLM's fields of chats and completions
    "guided_json": "response_format of type json_schema takes it",
    "guided_regex": "response_format of type regex takes it",
    "guided_choice": "response_format of type choice takes it",
    "structured_outputs": "response_format takes a JSON schema, a regex or a choice",
    **dict.fromkeys(
        ("chat_template_kwargs", "enable_thinking", "thinking_token_budget"),
        "reasoning_effort says how deep to think",
    ),
    "stop_token_ids": "stop takes strings",
    "allowed_token_ids": "logit_bias favours some",
    "prompt_logprobs": "logprobs are those of replies",
}


class Unauthorized(BadRequest):
    """No API key, or a wrong one."""


class Forbidden(BadRequest):
    """What this server, as it was started, lets nobody do."""


class BodyTooLarge(BadRequest):
    """More bytes than a request may have."""


class EncodedBody(BadRequest):
    """A compressed body."""


class HeadTooLarge(BadRequest):
    """More bytes than a request's line and headers may have."""


class SlowBody(BadRequest):
    """A body that did not arrive in time."""


class TimedOut(TRMError):
    """A request that took longer than the server lets one take."""

    code = "timeout"


class Unavailable(TRMError):
    """The server takes no work: it is stopping, or its device has failed."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


STATUS: Mapping[type[TRMError], tuple[int, str]] = {
    BadRequest: (400, "invalid_request_error"),
    Unauthorized: (401, "invalid_request_error"),
    Forbidden: (403, "invalid_request_error"),
    UnknownModel: (404, "invalid_request_error"),
    SlowBody: (408, "invalid_request_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    EncodedBody: (415, "invalid_request_error"),
    HeadTooLarge: (431, "invalid_request_error"),
    Overloaded: (429, "rate_limit_error"),
    DeviceError: (500, "server_error"),
    InternalError: (500, "server_error"),
    Unavailable: (503, "server_error"),
    TimedOut: (504, "server_error"),
}
INTERNAL_ERROR = "internal_error"
CODES: Mapping[type[TRMError], str] = {
    Overloaded: "queue_full",
    DeviceError: "device_error",
    InternalError: INTERNAL_ERROR,
}


ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Anthropic's word for each status; for all others it is invalid_request_error."""


@dataclass(frozen=True)
class Problem:
    """What there is to say of an error. kind: OpenAI's word for it."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None


Shape = Callable[[Problem], dict[str, Any]]

UNEXPECTED = Problem(
    500, "internal server error; the server's log has the details", "server_error", code=INTERNAL_ERROR
)
"""What a client learns of an unexpected exception."""


def openai_body(problem: Problem) -> dict[str, Any]:
    """The error shape of all other routes."""
    return {"error": {"message": problem.message, "type": problem.kind, "param": problem.param, "code": problem.code}}


def anthropic_body(problem: Problem) -> dict[str, Any]:
    """Anthropic's error shape."""
    kind = ANTHROPIC_TYPES.get(problem.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": problem.message}}


def ollama_body(problem: Problem) -> dict[str, Any]:
    """Ollama's error shape."""
    return {"error": problem.message}


SHAPES: Mapping[str, Shape] = {"/v1/messages": anthropic_body, "/api/": ollama_body}
"""By how a path begins."""


def shape(path: str) -> Shape:
    """How errors look on a path."""
    return next((body for prefix, body in SHAPES.items() if path.startswith(prefix)), openai_body)


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about fields that the API that was asked calls otherwise name them so, in their messages too."""
    try:
        yield
    except BadRequest as error:
        if (field := error.param) is not None and field in names:
            error.param = names[field]
            error.args = (re.sub(rf"^{field}\b", error.param, str(error)),)
        raise


def problem_of(error: TRMError) -> Problem:
    """What there is to say of an error raised on purpose."""
    status, kind = next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), (500, "server_error"))
    code = getattr(error, "code", None) or CODES.get(type(error))
    return Problem(status, str(error), kind, getattr(error, "param", None), code)


def describe(error: TRMError, path: str = "") -> tuple[int, dict[str, Any]]:
    """Status and body of an error raised on purpose, on a path."""
    problem = problem_of(error)
    return problem.status, shape(path)(problem)


def error_response(error: TRMError, path: str) -> JSONResponse:
    """The response for an error raised on purpose."""
    status, body = describe(error, path)
    headers = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, SlowBody):
        headers["Connection"] = "close"  # who knows when the rest would come
    return JSONResponse(body, status, headers)


def internal_error_response(path: str) -> JSONResponse:
    """The response for an unexpected exception."""
    return JSONResponse(shape(path)(UNEXPECTED), UNEXPECTED.status)


def install(app: FastAPI) -> None:
    """Give `app` the handlers that keep every error in shape."""

    @app.exception_handler(TRMError)
    async def refused(request: Request, error: TRMError) -> JSONResponse:
        return error_response(error, path_below(request.scope))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        """The first thing wrong with a body, by its dotted path."""
        problem, route = error.errors()[0], path_below(request.scope)
        broken = problem["type"] == "rule"  # of server.schemas.rules
        place = (*problem["loc"][1:], problem["ctx"]["param"]) if broken else problem["loc"][1:]
        path = ".".join(str(part) for part in place)[:MAX_PATH_CHARS]
        if broken:
            return error_response(BadRequest(problem["msg"], param=path), route)
        if not path:
            message = "the body must be a JSON object, sent with Content-Type: application/json"
            return error_response(BadRequest(message), route)
        if problem["type"] == "extra_forbidden":
            hint = f": {INSTEAD[path]}" if path in INSTEAD and route.endswith("/completions") else ""
            message = f"{path}: unknown or unsupported field; remove it{hint}"
            return error_response(BadRequest(message, param=path), route)
        said = "Input should be an object" if problem["type"] in NO_OBJECT else problem["msg"]
        return error_response(BadRequest(f"{path}: {said}", param=path), route)

    @app.exception_handler(HTTPException)
    async def unroutable(request: Request, error: HTTPException) -> JSONResponse:
        """What the framework itself refuses: unknown paths, wrong methods."""
        place = f"{request.method} {request.url.path}"[:MAX_PATH_CHARS]
        meant = _meant(app, request) if error.status_code == 404 else None
        advice = f"a base URL that makes it {meant} is right" if meant else "/openapi.json lists them all"
        known = {
            404: (f"{place}: no such route; {advice}", "unknown_url"),
            405: (f"{place}: wrong method; the header Allow names the right ones", "method_not_allowed"),
        }
        message, code = known.get(error.status_code, (error.detail, None))
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        body = shape(path_below(request.scope))(Problem(error.status_code, message, kind, code=code))
        return JSONResponse(body, error.status_code, error.headers)


def _meant(app: FastAPI, request: Request) -> str | None:
    """The path that a client means whose base URL has a /v1 too few or too many."""
    path = path_below(request.scope)
    for other in (f"/v1{path}", path.removeprefix("/v1")):
        scope = {"type": "http", "method": "POST", "path": other, "root_path": "", "headers": []}
        if other not in (path, "/") and any(route.matches(scope)[0] != Match.NONE for route in app.routes):
            return f"{request.scope.get('root_path', '')}{other}"[:MAX_PATH_CHARS]
    return None
