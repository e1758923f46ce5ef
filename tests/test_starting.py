"""Commands answer `--help` at once: they import neither torch nor transformers before they need them."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
HEAVY = {"torch", "transformers", "datasets", "accelerate", "matplotlib", "tensorboard", "numpy", "fastapi", "uvicorn"}

HELP = """
import importlib, json, sys, time
module, function, *arguments = sys.argv[1:]
sys.argv = ["command", *arguments]
try:
    getattr(importlib.import_module(module), function)()
except SystemExit as stop:
    assert stop.code == 0, stop.code
print(json.dumps({"modules": sorted(sys.modules), "cpu_s": time.process_time()}))
"""


def run(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


@pytest.mark.parametrize("command", sorted(SCRIPTS))
def test_help_is_light_and_quick(command):
    module, function = SCRIPTS[command].split(":")

    runs = [run(HELP, module, function, "--help") for _ in range(2)]

    assert runs[0].startswith("usage: trm-")
    seen = [json.loads(text.splitlines()[-1]) for text in runs]
    assert not HEAVY & set(seen[0]["modules"])
    assert min(one["cpu_s"] for one in seen) < 0.5


@pytest.mark.parametrize("module", ["trm", "trm.errors", "trm.settings", "trm.logs", "server.settings"])
def test_modules_below_the_model_are_light(module):
    loaded = json.loads(run(f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"))

    assert not HEAVY & set(loaded)


@pytest.mark.parametrize(
    "imports",
    [
        "import trm; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import trm",
        "import transformers, trm; from transformers import AutoConfig, AutoModelForCausalLM",
        "from trm import TRMForCausalLM; from transformers import AutoConfig, AutoModelForCausalLM",
        "import trm.config; from transformers import AutoModelForCausalLM, AutoConfig",
    ],
)
def test_the_auto_classes_know_the_model_whatever_is_imported_first(imports):
    code = f"""
{imports}
import trm
path = trm.bundled_model_path()
print(AutoConfig.from_pretrained(path).__class__ is trm.TRMConfig)
print(AutoModelForCausalLM.from_pretrained(path).__class__ is trm.TRMForCausalLM)
"""
    assert run(code).split() == ["True", "True"]


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    assert run("import trm; print(hasattr(trm, 'TRMForCasualLM'))") == "False\n"


WITHOUT_POSIX = """
import builtins
real = builtins.__import__
def without_posix(name, globals=None, *rest, **named):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if importer in ("trm", "server", "training") and name in ("fcntl", "termios", "resource"):
        raise ImportError(name)
    return real(name, globals, *rest, **named)
builtins.__import__ = without_posix
"""


def test_systems_without_posix_modules_can_import_everything():
    """Windows has none of these; the libraries that we use look at the platform themselves."""
    modules = "server.app, server.draining, training.run, training.checkpoints"
    assert run(f"{WITHOUT_POSIX}\nimport {modules}\nprint(1)") == "1\n"


def test_threads_that_import_ours_and_theirs_at_once_do_not_wait_for_each_other():
    """The hook runs while the Auto classes' module is locked; another thread may hold ours and wait for that one."""
    code = """
import threading
import transformers
import trm
failures = []
def attempt(work):
    try:
        work()
    except BaseException as failure:
        failures.append(failure)
def theirs():
    from transformers import AutoModelForCausalLM
def ours():
    trm.TRMForCausalLM
threads = [threading.Thread(target=attempt, args=[work]) for work in (ours, theirs)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(failures, type(transformers.AutoModelForCausalLM.from_pretrained(trm.bundled_model_path())).__name__)
"""
    assert run(code) == "[] TRMForCausalLM\n"
