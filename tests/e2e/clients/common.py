"""What all scripts ask, and of whom."""

import os

BASE_URL = os.environ["BASE_URL"]
MODEL = os.environ["MODEL"]
KEY = os.environ["KEY"]
QUESTION = os.environ["QUESTION"]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
