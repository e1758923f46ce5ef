"""The OpenAPI document: what FastAPI finds in the routes, and what it cannot see.

Ranges of sampling parameters stand in `trm.engine.request`, what they are for this server in its engine and
settings, and errors in `server.errors`; here they come together, and nothing is said twice.
"""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from server.errors import STATUS, Shape, Unavailable, anthropic_body, ollama_body, openai_body, shape
from server.middleware import CLOSED_PATHS, is_public
from server.schemas.anthropic import AnthropicErrorBody
from server.schemas.common import ErrorBody
from server.schemas.ollama import OllamaErrorBody
from server.serving import Serving
from trm.engine.request import BIASES, RANGES, Range

JSONSchema = dict[str, Any]

TOKEN_IDS = (("CompletionRequest", "prompt"), ("DetokenizeRequest", "tokens"))  # where clients send some
UNASKED = {431, 500}  # any request may meet it
READING = {401, 404, 503}  # what a GET may be refused with
ERRORS: dict[Shape, type[BaseModel]] = {
    openai_body: ErrorBody,
    anthropic_body: AnthropicErrorBody,
    ollama_body: OllamaErrorBody,
}
HEADERS = {401: "WWW-Authenticate", 429: "Retry-After"}


def install(app: FastAPI) -> None:
    """Make `app` describe itself, limits included, as soon as it serves."""

    def describe() -> JSONSchema:
        if app.openapi_schema is None:
            serving: Serving | None = app.state.serving
            if serving is None:
                raise Unavailable("the server is still loading its model; try again in a moment", "starting")
            app.openapi_schema = document(app, serving)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's documented way


def limits(serving: Serving) -> dict[str, JSONSchema]:
    """What the fields of request bodies may hold, by name, whichever model is asked."""
    engine, settings, models = serving.engine, serving.settings, serving.models
    vocabulary = engine.model.config.vocab_size
    stop = {"type": "string", "minLength": 1, "maxLength": settings.max_stop_chars}
    stops = {"type": "array", "items": stop, "maxItems": settings.max_stop}
    return {name: _range(allowed) for name, allowed in RANGES.items()} | {
        "n": {"minimum": 1, "maximum": min(settings.max_n, engine.config.max_rows + engine.config.max_queue)},
        "supervision_steps": {"minimum": 0, "maximum": max(one.max_supervision for one in models.values())},
        "max_completion_tokens": _range(RANGES["max_tokens"]),
        "max_output_tokens": _range(RANGES["max_tokens"]),
        "top_logprobs": {"minimum": 0, "maximum": min(RANGES["logprobs"].most, vocabulary)},
        "logit_bias": {
            "propertyNames": {"pattern": f"^({up_to(vocabulary - 1)})$"},
            "additionalProperties": {"type": "number", **_range(BIASES)},
        },
        "stop": {"anyOf": [stop, stops, {"type": "null"}]},
        "stop_sequences": {"anyOf": [stops, {"type": "null"}]},
        "messages": {"maxItems": settings.max_messages},
        "input": {"maxItems": settings.max_messages},
        "model": {"enum": [*models, None]},
    }


def document(app: FastAPI, serving: Serving) -> JSONSchema:
    """The app's document, with the limits of what it serves."""
    settings, keys = serving.settings, bool(serving.settings.keys())
    described = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas: dict[str, JSONSchema] = described["components"]["schemas"]
    for error in ERRORS.values():
        schemas[error.__name__] = error.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schemas[error.__name__].pop("$defs", {})
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            parameters = operation.get("parameters", [])
            for parameter in parameters:  # all there is in paths is the model's name
                parameter["schema"]["enum"] = list(serving.models)
            possible = UNASKED | ({status for status, _ in STATUS.values()} if method == "post" else READING)
            if not path.startswith(CLOSED_PATHS):
                possible = possible - {403}
            if not keys:
                possible = possible - {401}
            if method == "get" and not parameters:
                possible = possible - {404}
            operation["responses"].pop("422", None)  # FastAPI's own way to refuse a body; ours is 400
            operation["responses"] |= {str(status): _error(status, shape(path)) for status in sorted(possible)}
            if keys and is_public(path, settings.public_paths):
                operation["security"] = []
    for name in {"HTTPValidationError", "ValidationError"} & schemas.keys():
        del schemas[name]
    narrowed = limits(serving)
    for schema in schemas.values():
        if schema.get("additionalProperties") is False:  # what clients send
            for name in schema["properties"].keys() & narrowed.keys():
                schema["properties"][name] |= narrowed[name]
    for name, field in TOKEN_IDS:
        _bound(schemas[name]["properties"][field], serving.engine.model.config.vocab_size - 1)
    if keys:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def up_to(largest: int) -> str:
    """A regular expression for the decimal spellings of 0 to `largest`, without leading zeros."""
    digits = str(largest)
    shorter = ["0"] if len(digits) > 1 else []
    shorter += [f"[1-9][0-9]{{{length}}}" for length in range(len(digits) - 1)]
    same = []
    for place, digit in enumerate(digits):
        least = 1 if place == 0 and len(digits) > 1 else 0
        if int(digit) > least:
            free = len(digits) - place - 1
            same.append(f"{digits[:place]}[{least}-{int(digit) - 1}]" + (f"[0-9]{{{free}}}" if free else ""))
    return "|".join([*shorter, *same, digits])


def _bound(schema: Any, largest: int) -> None:
    """Give every integer inside of a schema its range, from 0."""
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _bound(inner, largest)
    if isinstance(schema, dict) and schema.get("type") == "integer":
        schema |= {"minimum": 0, "maximum": largest}


def _range(allowed: Range) -> JSONSchema:
    schema = {"exclusiveMinimum" if allowed.open_least else "minimum": allowed.least}
    if allowed.most != float("inf"):
        schema["exclusiveMaximum" if allowed.open_most else "maximum"] = allowed.most
    return schema


def _error(status: int, looks: Shape) -> JSONSchema:
    response: JSONSchema = {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{ERRORS[looks].__name__}"}}},
    }
    if status in HEADERS:
        response["headers"] = {HEADERS[status]: {"schema": {"type": "string"}}}
    return response
