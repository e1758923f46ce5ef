"""What schemathesis must know of the server beside the document: the one condition that JSON Schema cannot say."""

from typing import Any

import schemathesis
from schemathesis.checks import CHECKS
from schemathesis.specs.openapi.checks import positive_data_acceptance as accepted

CHECKS.unregister(accepted.__name__)


@schemathesis.check
def positive_data_acceptance(ctx: Any, response: Any, case: Any) -> bool | None:
    """The check of that name, in its place, except for conversations that end with a reply."""
    messages = case.body.get("messages") if isinstance(case.body, dict) else None
    last = messages[-1] if isinstance(messages, list) and messages else None
    is_reply = isinstance(last, dict) and last.get("role") == "assistant"
    if response.status_code == 400 and is_reply and "going on with a reply is not implemented" in response.text:
        return None
    result: bool | None = accepted(ctx, response, case)
    return result
