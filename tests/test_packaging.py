"""What pyproject.toml asks for, and the one lock that clones, the gate and the images install."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def locked() -> dict[str, str]:
    """Package -> version, as far as the lock speaks of this platform."""
    lines = (line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#"))
    pins = [Requirement(line) for line in lines]
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


@pytest.mark.parametrize("group", ["dependencies", *EXTRAS])
def test_the_lock_meets_what_pyproject_asks_for(group):
    """After a change of pyproject.toml: `make lock`."""
    pins = locked()
    for line in EXTRAS.get(group, PROJECT["dependencies"]):
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        assert name in pins, f"{wanted.name} is not locked; run make lock"
        assert wanted.specifier.contains(pins[name]), f"{line} is locked at {pins[name]}; run make lock"


def test_the_lock_names_packages_and_no_places():
    """Where packages come from is the user's affair."""
    text = (ROOT / "requirements.lock").read_text()

    assert "://" not in text
    assert " @ " not in text
    assert "--" not in text


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_what_is_installed_lies_in_the_range_that_pyproject_states(line):
    wanted = Requirement(line)
    if wanted.marker is None or wanted.marker.evaluate():
        assert wanted.specifier.contains(metadata.version(wanted.name)), line


def test_the_version_stands_in_one_place():
    assert trm.__version__ == PROJECT["version"]
    assert (ROOT / "trm" / "py.typed").exists()


def test_what_deploys_names_this_version():
    """Tags of images in manifests and compose files."""
    named = [
        path
        for path in sorted((ROOT / "deploy").rglob("*.yaml"))
        for line in path.read_text().splitlines()
        if "qwen-trm:" in line or "newTag:" in line
        if PROJECT["version"] not in line
    ]
    assert named == []
