"""The pages stay short, narrow and true: links, files, targets, commands and flags that they name exist."""

import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pages import PAGES, ROOT, blocks, commands

CHANGELOG = ROOT / "CHANGELOG.md"
PRESENT = [page for page in PAGES if page != CHANGELOG]  # what was true of 0.1.0 need not be true today
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GITHUB = sorted((ROOT / ".github").rglob("*.yml"))
MAX_COLUMNS = 120
MAX_README_LINES = 80

HELP = "import sys; from {module} import {function} as main; sys.argv = ['trm', *{words}, '--help']; main()"
BENCHMARKS = ("decode", "peers", "serve", "soak")
OURS = re.compile(r"(?<![\w./-])(?:trm|server|training|tests|deploy|docs)/[\w./-]*")
CURVES = {"training/loss"}  # of TensorBoard, no file
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name)
each_present_page = pytest.mark.parametrize("page", PRESENT, ids=name)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@cache
def flags(command: str) -> frozenset[str]:
    """The flags that a command of ours explains, or one benchmark of `trm-bench`."""
    program, *words = command.split()
    module, function = PROJECT["scripts"][program].split(":")
    code = HELP.format(module=module, function=function, words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return frozenset(FLAG.findall(done.stdout))


def all_flags() -> frozenset[str]:
    programs = [name for name in PROJECT["scripts"] if name != "trm-bench"]
    return frozenset().union(*map(flags, programs + [f"trm-bench {name}" for name in BENCHMARKS]))


def targets() -> set[str]:
    lines = re.findall(r"^([a-z][a-z0-9 -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {target for line in lines for target in line.split()}


def anchors(page: Path) -> set[str]:
    """Where links into a page may lead, as GitHub spells it."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


@each_page
def test_lines_are_narrow(page: Path) -> None:
    """Tables and addresses cannot be broken."""
    lines = [re.sub(r"https?://\S+", "", line) for line in page.read_text().splitlines() if not line.startswith("|")]

    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "log.md", ROOT / "docs" / "soak" / "README.md"], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for path, _, place in (link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())):
        target = page.parent / path if path else page
        if not path.startswith(("http:", "https:")):
            assert target.exists(), path
            assert not place or place in anchors(target), f"{path}#{place}"


def test_the_index_leads_to_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}

    assert {page for page in pages if f"]({page})" not in index} == set()


@each_present_page
def test_files_that_are_named_exist(page: Path) -> None:
    found = {path.rstrip(".") for line in commands(page) for path in OURS.findall(line)}

    assert {path for path in found - CURVES if not (ROOT / path).exists()} == set()


@each_present_page
def test_targets_of_make_exist(page: Path) -> None:
    asked = [words for line in commands(page) for words in re.findall(r"(?:^|[=\d] )make ([a-z][a-z0-9 -]*)", line)]

    assert {target for words in asked for target in words.split()} - targets() == set()


@each_present_page
def test_commands_take_the_flags_that_they_are_shown_with(page: Path) -> None:
    for line in commands(page):
        for command, rest in re.findall(r"(?:^|[\s/])(trm-bench \w+|trm-[a-z]+)([^|&;]*)", line):
            assert set(FLAG.findall(rest)) <= flags(command), line


@each_present_page
def test_a_flag_alone_is_one_of_ours(page: Path) -> None:
    alone = {FLAG.match(line)[0] for line in commands(page) if FLAG.match(line)}  # type: ignore[index]

    assert alone - all_flags() == set()


@each_present_page
def test_modules_that_are_run_exist(page: Path) -> None:
    modules = {name for line in commands(page) for name in re.findall(r"-m ((?:trm|server|training)[\w.]*)", line)}
    files = {name: ROOT / name.replace(".", "/") for name in modules}

    assert {
        n for n, path in files.items() if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists())
    } == set()


def test_the_scan_sees_what_the_pages_name() -> None:
    """Or the tests above would pass on anything."""
    lines = [line for page in PRESENT for line in commands(page)]

    assert {"serve", "test", "newest", "oldest", "lock"} <= targets()
    assert any(re.search(r"^make newest", line) for line in lines)
    assert {"--drain-seconds", "--api-key"} <= flags("trm-serve")
    assert sum(bool(FLAG.match(line)) for line in lines) > 50
    assert sum(bool(OURS.search(line)) for line in lines) > 50
    assert len(PAGES) > 15


def test_the_runbook_is_a_page_of_commands_too() -> None:
    assert any("trm-serve --model" in line for line in commands(ROOT / "deploy" / "runbook.md"))
    assert blocks(ROOT / "deploy" / "runbook.md", "bash")


@pytest.mark.parametrize("path", [*GITHUB, ROOT / ".pre-commit-config.yaml"], ids=name)
def test_yaml_parses(path: Path) -> None:
    assert isinstance(load(path), dict)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=name)
def test_workflows_call_what_a_person_calls(path: Path) -> None:
    workflow = load(path)

    assert workflow[True]  # "on", which YAML 1.1 reads as a truth
    for job in workflow["jobs"].values():
        asked = job.get("strategy", {}).get("matrix", {}).get("target", [])
        last = job["steps"][-1]["run"]
        assert last == ".ci/run" or (last == "make ${{ matrix.target }}" and asked)
        assert set(asked) <= targets()
        assert job["timeout-minutes"]


def test_issue_forms_ask_for_something() -> None:
    for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")):
        form = load(path)
        assert form["name"]
        assert form["description"]
        assert {field["type"] for field in form["body"]} <= {"markdown", "textarea"}


def test_hooks_run_what_lint_runs() -> None:
    hooks = [hook for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]

    assert [hook["entry"] for hook in hooks] == [
        ".venv/bin/ruff check --fix",
        ".venv/bin/ruff format",
        ".venv/bin/mypy",
    ]


def test_the_citation_has_what_its_format_asks_for() -> None:
    citation = load(ROOT / "CITATION.cff")

    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_the_changelog_begins_with_this_version() -> None:
    [first, *_] = re.findall(r"^## (\S+)", CHANGELOG.read_text(), re.MULTILINE)

    assert first == PROJECT["version"]
