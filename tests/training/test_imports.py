"""Imports of training point one way: config, its parts, trainer, run, cli; and research is above them all."""

from itertools import pairwise

import pytest

from tests.trm.test_imports import ROOT, closure, own_modules, sources

MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources("training")]
LAYERS = ["training.config", "training.trainer", "training.building", "training.run", "training.cli"]


def needs(module: str) -> set[str]:
    """The modules that a module needs, through others too."""
    return closure(module) - {module}


@pytest.mark.parametrize(("lower", "higher"), list(pairwise(LAYERS)))
def test_a_layer_stands_on_the_one_below(lower: str, higher: str) -> None:
    assert lower in needs(higher)
    assert higher not in needs(lower)


def test_config_is_a_leaf() -> None:
    assert not [name for name in needs("training.config") if name.startswith("training.")]


def test_only_commands_and_research_stand_on_a_run() -> None:
    above = {name for name in MODULES if "training.run" in needs(name) and not name.startswith("training.research.")}

    assert above == {"training.cli", "training.__main__"}


def test_nothing_stands_on_research() -> None:
    research = {name for name in MODULES if name.startswith("training.research.")}

    assert not [name for name in MODULES if needs(name) & research and name not in research]


def test_modules_of_training_form_no_cycle() -> None:
    for module in MODULES:
        below: set[str] = set().union(*(closure(name) for name in own_modules(ROOT / f"{module.replace('.', '/')}.py")))
        assert module not in below, f"{module} needs itself"
