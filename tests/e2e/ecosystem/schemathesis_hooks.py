"""What schemathesis must know of the server beside the document: conditions that JSON Schema cannot say."""

import ast
import re
import threading
from typing import Any

import schemathesis
from schemathesis.checks import CHECKS
from schemathesis.specs.openapi.checks import positive_data_acceptance as accepted

REFUSED = re.compile(
    r"(response_format|text\.format|output_config\.format|format|tools) cannot be served: |"
    r"the prompt has (more than )?[0-9]+ tokens; this server takes [0-9]+"
)
"""A schema inside the body that is none, or that no reply can be held to; a text beyond the context."""
GOING_ON = "going on with a reply is not implemented"

_parse, _one_at_a_time = ast.parse, threading.RLock()


def parse(*args: Any, **kwargs: Any) -> Any:
    """`ast.parse`, with which hypothesis reads its own source, for several workers.

    CPython 3.11 counts its depth once for all threads: "AST constructor recursion depth mismatch".
    """
    with _one_at_a_time:
        return _parse(*args, **kwargs)


ast.parse = parse  # type: ignore[assignment]
CHECKS.unregister(accepted.__name__)


@schemathesis.check
def positive_data_acceptance(ctx: Any, response: Any, case: Any) -> bool | None:
    """The check of that name, in its place, except for these and for conversations that end with a reply."""
    messages = case.body.get("messages") if isinstance(case.body, dict) else None
    last = messages[-1] if isinstance(messages, list) and messages else None
    is_reply = isinstance(last, dict) and last.get("role") == "assistant"
    if response.status_code == 400 and (REFUSED.search(response.text) or (is_reply and GOING_ON in response.text)):
        return None
    result: bool | None = accepted(ctx, response, case)
    return result
