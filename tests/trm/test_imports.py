"""Imports point one way: server to trm, training to trm, and inside trm from the engine down to the leaves."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, inside functions too, and the names that might be modules."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def file_of(module: str) -> Path:
    """Where a module of ours lies, or a package."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def own_modules(path: Path) -> set[str]:
    """The modules of trm that a file imports, and the packages inside trm that it imports as one."""
    return {name for name in imports(path) if name != "trm" and file_of(name).is_file()}


def closure(module: str) -> set[str]:
    """Everything that a module of trm needs besides its package's own `__init__`."""
    done: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in done:
            done.add(name)
            todo += own_modules(file_of(name))
    return done


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("trm", {"server", "training", "tests"}), ("server", {"training", "tests"}), ("training", {"server", "tests"})],
)
def test_packages_import_one_way(package, forbidden):
    offenders = {str(path): packages(path) & forbidden for path in sources(package)}

    assert {path: names for path, names in offenders.items() if names} == {}


@pytest.mark.parametrize("package", ["trm", "server"])
def test_only_benchmarks_import_benchmarks(package):
    """And `trm-bench` those of both: nobody who serves or decodes pays for what measures it."""
    offenders = {
        str(path)
        for path in sources(package)
        if "bench" not in path.parts and any("bench" in name.split(".") for name in imports(path))
    }

    assert offenders == set()


@pytest.mark.parametrize("module", ["trm.engine.scheduler", "trm.engine.request", "trm.errors", "trm.answers"])
def test_modules_that_touch_no_tensors_import_none(module):
    """Neither themselves nor through another module of ours, so that policy is tested in microseconds."""
    for name in closure(module):
        assert not packages(file_of(name)) & HEAVY, name


@pytest.mark.parametrize("path", [ROOT / "trm" / "errors.py", *sources("trm/answers")], ids=lambda path: path.stem)
def test_leaves_need_only_the_standard_library(path):
    others = {name for name in imports(path) if not f"{name}.".startswith("trm.answers.")}

    assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names


def test_nothing_below_the_engine_imports_it():
    """The reference may: it is the tests' oracle, and shares the sampling on purpose."""
    for path in (ROOT / "trm").glob("*.py"):
        if path.stem != "reference":
            assert not [name for name in imports(path) if name.startswith("trm.engine")], path.name


def test_modules_of_trm_form_no_cycle():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources("trm") if path.stem != "__init__"
    ]
    for module in modules:
        below = set().union(*(closure(name) for name in own_modules(file_of(module))))
        assert module not in below, f"{module} needs itself"


def test_every_package_is_installed():
    """`pyproject.toml` lists packages one by one; a forgotten one works in the checkout only."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]

    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in ("trm", "server", "training")
        for path in sources(name)
    }
    assert set(listed) >= found


def test_the_scan_sees_imports_inside_functions(tmp_path):
    (tmp_path / "odd.py").write_text("def f():\n    import server.app\n    from training import loss\n")

    assert packages(tmp_path / "odd.py") == {"server", "training"}
