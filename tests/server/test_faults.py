"""Of a body in which everything is wrong, little is checked: whoever sends one keeps nobody waiting."""

import importlib
import json
import pkgutil
import time

import pytest
from pydantic import TypeAdapter, ValidationError

import server.schemas
from server.schemas.common import Body

pytestmark = pytest.mark.anyio

MANY = 5_000
ITEMS = (0, -1, "", "a", None, True, {}, {"type": "text"}, {"type": "function", "function": {}}, [], [[]], 0.5)


def bodies(kind=Body):
    for module in pkgutil.iter_modules(server.schemas.__path__):
        importlib.import_module(f"server.schemas.{module.name}")
    for body in kind.__subclasses__():
        yield body
        yield from bodies(body)


@pytest.mark.parametrize("body", sorted(set(bodies()), key=lambda body: (body.__module__, body.__name__)))
def test_a_list_is_refused_for_its_first_bad_item(body):
    worst = 0
    for name, field in body.model_fields.items():
        for item in ITEMS:
            try:
                TypeAdapter(body).validate_python({field.alias or name: [item] * MANY})
            except ValidationError as error:
                worst = max(worst, error.error_count())

    assert worst < 20 + len(body.model_fields)  # every required field that is missing is one, too


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"stop": [0]}),
        ("/v1/chat/completions", {"tools": [{}]}),
        ("/v1/chat/completions", {"response_format": {"type": "choice", "choice": [0]}}),
        ("/v1/messages", {"stop_sequences": [0], "max_tokens": 1}),
        ("/v1/messages", {"tools": [0], "max_tokens": 1}),
        ("/v1/responses", {"tools": [0], "messages": None, "input": "a"}),
        ("/api/chat", {"options": {"stop": [0]}}),
        ("/detokenize", {"tokens": [""], "messages": None}),
    ],
    ids=str,
)
async def test_a_body_of_nothing_but_mistakes_is_refused_at_once(client, path, fields):
    body = {"messages": [{"role": "user", "content": "a"}], **fields}
    body = {name: value for name, value in body.items() if value is not None}
    text = json.dumps(body)
    bad = json.dumps(next(item for item in ([0], [{}], [""]) if json.dumps(item) in text))
    text = text.replace(bad, "[" + ",".join([bad[1:-1]] * 100_000) + "]")

    started = time.process_time()
    response = await client.post(path, content=text, headers={"Content-Type": "application/json"})

    assert response.status_code == 400
    assert time.process_time() - started < 0.2
