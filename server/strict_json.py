"""Request bodies parsed without the leniency of Python's JSON: no NaN, no Infinity, no lone surrogates.

Nor so many fields that checking them would keep everybody else waiting.
"""

from codecs import BOM_UTF8
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException


class _StrictRequest(Request):
    async def json(self) -> Any:
        body, limit = await self.body(), self.app.state.settings.max_body_fields
        try:
            content = from_json(body.removeprefix(BOM_UTF8), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not valid JSON: {error}") from None
        if body.count(b":") > limit:  # each field has one; few texts have so many
            _check_fields(content, limit)
        return content


def _check_fields(content: Any, limit: int) -> None:
    """Raise a 400 where the objects in `content` have more fields than `limit` together."""
    level, fields = [content], 0
    while level:
        fields += sum(len(value) for value in level if isinstance(value, dict))
        if fields > limit:
            raise HTTPException(400, f"the body has more than {limit} fields, this server's limit (--max-body-fields)")
        inside = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inside for value in values if isinstance(value, (dict, list))]


class StrictRoute(APIRoute):
    """A route whose body is parsed strictly. What cannot be parsed is a 400 that says where."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict
