"""Of a body in which everything is wrong, little is checked: whoever sends one keeps nobody waiting."""

import importlib
import pkgutil

import pytest
from pydantic import TypeAdapter, ValidationError

import server.schemas
from server.schemas.common import Body

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
