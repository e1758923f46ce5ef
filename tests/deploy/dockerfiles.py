"""Dockerfiles as lists of instructions, and what of the repository reaches a build."""

import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest of its line); comments are dropped."""
    lines = dockerfile.read_text().replace("\\\n", " ").splitlines()
    words = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(instruction, rest.strip()) for instruction, _, rest in words]


def stages(dockerfile: Path) -> Iterator[list[tuple[str, str]]]:
    """The instructions of each stage, its FROM first."""
    whole = instructions(dockerfile)
    starts = [place for place, (instruction, _) in enumerate(whole) if instruction == "FROM"]
    for start, end in zip(starts, [*starts[1:], len(whole)], strict=True):
        yield whole[start:end]


def context() -> list[Path]:
    """The repository's files, relative to its root, that .dockerignore lets through; its last fitting line decides."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def passes(name: str) -> bool:
        fitting = [rule for rule in rules if _fits(name, rule.removeprefix("!"))]
        return not fitting or fitting[-1].startswith("!")

    return [Path(name) for name in files if passes(name) and (ROOT / name).is_file()]


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern of .dockerignore means this file or a folder that it lies in."""
    pattern = pattern.rstrip("/")
    parts = name.split("/")
    above = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    if pattern.startswith("**/"):
        return any(fnmatch(part, pattern[3:]) for part in parts)
    return any(fnmatch(path, pattern) for path in above)
