"""What the README and the pages behind it show is what happens."""

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ServerProcess, clean_environment
from tests.pages import PAGES, ROOT, blocks

README, QUICKSTART = ROOT / "README.md", ROOT / "docs" / "quickstart.md"
SERVING, RUNBOOK = ROOT / "docs" / "serving.md", ROOT / "deploy" / "runbook.md"


def only(page: Path, language: str, sign: str) -> str:
    """The one code block of a page that holds `sign`."""
    [block] = [block for block in blocks(page, language) if sign in block]
    return block


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|deprecat", done.stderr, re.I), done.stderr  # what libraries log is read too
    return done.stdout


def ask(server: ServerProcess, curl: str) -> dict[str, object]:
    """What `/solve` answers to the body of a curl command."""
    body = json.loads(re.search(r"-d '(.*)'", curl)[1])  # type: ignore[index]
    answer: dict[str, object] = httpx.post(f"{server.url}/solve", json=body, timeout=60).json()
    return answer


def test_it_opens_with_the_two_commands() -> None:
    assert re.match(r"make serve .*\nmake test ", blocks(README, "sh")[0])


def test_the_solve_example_gives_the_answer_that_is_shown(server: ServerProcess) -> None:
    shown = json.loads(only(README, "json", "answer"))

    answered = ask(server, only(README, "sh", "curl"))

    assert answered == shown | {"usage": answered["usage"]}
    assert shown["usage"].items() <= answered["usage"].items()  # type: ignore[attr-defined]


def test_the_transformers_example_solves_its_question() -> None:
    assert run_python(only(README, "python", "AutoModelForCausalLM")).endswith("\\boxed{5}\n")


def test_the_batch_example_solves_both_questions() -> None:
    printed = run_python(only(QUICKSTART, "python", "AutoModelForCausalLM"))

    assert r"\\boxed{6}" in printed
    assert r"\\boxed{5}" in printed


def test_the_openai_example_streams_a_boxed_answer(server: ServerProcess) -> None:
    code = only(QUICKSTART, "python", "OpenAI(")

    printed = run_python(code.replace("http://127.0.0.1:8000", server.url))

    assert printed.endswith(r"\boxed{24}")


def test_the_pages_show_no_other_python() -> None:
    """A new block needs its test here."""
    assert {page: len(blocks(page, "python")) for page in PAGES if blocks(page, "python")} == {README: 1, QUICKSTART: 2}


def test_the_runbooks_question_has_the_answer_that_it_says(server: ServerProcess) -> None:
    [said] = re.findall(r"The bundled model says (\d+)", RUNBOOK.read_text())

    assert ask(server, only(RUNBOOK, "bash", "curl"))["answer"] == said


def test_a_record_of_the_log_has_the_fields_that_are_shown(server: ServerProcess) -> None:
    shown = json.loads(only(SERVING, "json", "request_id"))

    ask(server, only(README, "sh", "curl"))

    [*_, record] = [record for record in server.requests if record["path"] == shown["path"]]
    assert record.keys() == shown.keys()
    assert {name: type(value) for name, value in record.items()} == {k: type(v) for k, v in shown.items()}


@pytest.mark.parametrize("command", ["trm-serve", "trm-train", "trm-eval", "trm-sample", "trm-pretrain", "trm-bench"])
def test_every_command_explains_itself(command: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / command), "--help"], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0
    assert "usage:" in done.stdout
