"""What the README shows is what happens."""

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ServerProcess, clean_environment

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=clean_environment()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_opens_with_the_two_commands() -> None:
    assert re.match(r"make serve .*\nmake test ", blocks("sh")[0])


def test_the_solve_example_gives_the_answer_that_is_shown(server: ServerProcess) -> None:
    (command,) = [block for block in blocks("sh") if "curl" in block]
    body = json.loads(re.search(r"-d '(.*)'", command)[1])  # type: ignore[index]
    shown = json.loads(blocks("json")[0])

    answered = httpx.post(f"{server.url}/solve", json=body, timeout=60).json()

    answered["usage"] = {name: answered["usage"][name] for name in shown["usage"]}
    assert answered == shown


def test_the_openai_example_streams_a_boxed_answer(server: ServerProcess) -> None:
    (code,) = [block for block in blocks("python") if "OpenAI(" in block]

    printed = run_python(code.replace("http://127.0.0.1:8000", server.url))

    assert printed.endswith(r"\boxed{24}")


def test_the_transformers_example_solves_both_questions() -> None:
    (code,) = [block for block in blocks("python") if "AutoModelForCausalLM" in block]

    printed = run_python(code)

    assert r"\\boxed{6}" in printed
    assert r"\\boxed{5}" in printed


@pytest.mark.parametrize("command", ["trm-serve", "trm-train", "trm-eval", "trm-pretrain", "trm-bench"])
def test_every_command_explains_itself(command: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / command), "--help"], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0
    assert "usage:" in done.stdout
