"""What the runbook says of errors, memory and files, against the code."""

import re
from typing import Any

import pytest
from transformers import Qwen2Config

from server.errors import CODES, STATUS
from tests.deploy.dockerfiles import DEPLOY, ROOT
from trm import TRMForCausalLM, bundled_model_path
from trm.config import TRMConfig
from trm.engine.runner import Runner

RUNBOOK = (DEPLOY / "runbook.md").read_text()
ERRORS = RUNBOOK.partition("## Errors that clients meet")[2].partition("\n## ")[0]
RAISED = re.compile(r'code="(\w+)"|\bcode = "(\w+)"|Unavailable\([^()]*"(\w+)"\)', re.DOTALL)
SOURCES = [*(ROOT / "server").rglob("*.py"), *(ROOT / "trm").rglob("*.py"), DEPLOY / "ray_serve.py"]


def test_every_error_that_a_client_can_meet_has_its_line() -> None:
    raised = {code for path in SOURCES for codes in RAISED.findall(path.read_text()) for code in codes if code}
    raised |= set(CODES.values())

    assert {"context_length_exceeded", "timeout", "starting", "draining", "replica_lost", "queue_full"} <= raised
    assert {code for code in raised if f"`{code}`" not in ERRORS} == set()
    assert {
        status for status, _ in STATUS.values() if not re.search(rf"^\|.*\b{status}\b", ERRORS, re.MULTILINE)
    } == set()


def in_table(name: str) -> int:
    [row] = [line for line in RUNBOOK.splitlines() if line.startswith(f"| {name}")]
    return int(row.split("|")[3].replace(",", ""))


def test_the_bytes_of_the_bundled_model() -> None:
    model = TRMForCausalLM.from_pretrained(bundled_model_path())

    assert in_table("bundled") == Runner.bytes_per_position(model, model.config.n_layers)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (
            "Qwen2-0.5B",
            {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896},
        ),
        (
            "Qwen2-7B",
            {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584},
        ),
    ],
)
def test_the_bytes_of_larger_models_by_the_runbooks_formula(name: str, shape: dict[str, Any]) -> None:
    config = TRMConfig(backbone_config=Qwen2Config(**shape).to_dict())
    bfloat16 = 2

    layers = shape["num_hidden_layers"] + config.cache_entries(config.max_supervision)
    assert in_table(name) == 2 * shape["num_key_value_heads"] * config.head_dim * layers * bfloat16
