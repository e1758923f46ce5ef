"""Nothing is ever unpickled."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trm.checkpoints import BACKBONE_WEIGHTS, load
from trm.checkpoint import BACKBONE_DIR
from trm.errors import CheckpointError

ROOT = Path(__file__).parents[2]
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def unsafe_uses(source: str) -> list[str]:
    """Imports of serialisers that execute what they read, and calls that use them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += sorted(names & UNSAFE_CALLS)
            found += [str(node.module)] if str(node.module).split(".")[0] in UNSAFE_MODULES else []
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize("package", ["trm", "server", "training"])
def test_no_source_file_can_unpickle(package):
    sources = sorted((ROOT / package).rglob("*.py"))
    assert sources

    assert {str(path): uses for path in sources if (uses := unsafe_uses(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "x = torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "import joblib.x as y",
    ],
)
def test_the_scan_sees_what_it_looks_for(source):
    assert unsafe_uses(source)


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pickle_beside_the_weights_is_never_opened(make_checkpoint, tmp_path):
    directory, _ = make_checkpoint()
    for place in (directory, directory / BACKBONE_DIR):
        torch.save(Evil(tmp_path / "executed"), place / "pytorch_model.bin")

    load(directory)

    assert not (tmp_path / "executed").exists()


def test_pickle_is_not_opened_where_only_other_tensors_are_safe(make_checkpoint, tmp_path):
    """A safetensors file of any name shows good will, and transformers would then fall back to the pickle."""
    directory, _ = make_checkpoint()
    (directory / BACKBONE_WEIGHTS).rename(directory / BACKBONE_DIR / "adapter.safetensors")
    torch.save(Evil(tmp_path / "executed"), directory / BACKBONE_DIR / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match="backbone: "):
        load(directory)

    assert not (tmp_path / "executed").exists()
