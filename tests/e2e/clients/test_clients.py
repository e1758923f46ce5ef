"""Clients that others wrote, as their users call them: chat, stream, second turn, structured output, tools.

Each has a script here, run in an environment that `make e2e` makes for them, beside ours: what they need is theirs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ServerProcess, clean_environment

SCRIPTS = Path(__file__).parent
CLIENTS = Path(os.environ.get("CLIENTS", SCRIPTS.parents[2] / ".venv-clients"))
QUESTION = "Tom has 12 apples and buys 7 more. How many apples does Tom have now?"


def run_client(server: ServerProcess, *command: str) -> None:
    told = {"BASE_URL": f"{server.url}/v1", "MODEL": "qwen-trm", "KEY": "none", "QUESTION": QUESTION}
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=clean_environment() | told | quiet)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*_client.py")))
def test_a_python_client_works_unchanged(server: ServerProcess, script: str) -> None:
    if not (CLIENTS / "bin/python").exists():
        pytest.skip("no environment of clients; make e2e makes it")

    run_client(server, str(CLIENTS / "bin/python"), str(SCRIPTS / script))


def test_the_newest_openai_client_works_unchanged(server: ServerProcess) -> None:
    run_client(server, sys.executable, str(SCRIPTS / "openai_client.py"))


@pytest.mark.parametrize("provider", ["compatible", "chat", "responses"])
def test_the_ai_sdk_works_unchanged(server: ServerProcess, provider: str) -> None:
    node = shutil.which("node")
    if node is None or not (CLIENTS / "node_modules").exists():
        pytest.skip("no packages of Node; make e2e installs them where there are node and npm")
    script = CLIENTS / "ai_sdk.mjs"  # Node looks for packages beside the script
    shutil.copy(SCRIPTS / script.name, script)

    run_client(server, node, str(script), provider)
