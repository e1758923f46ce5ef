"""What tools say of the code and of what it stands on."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def bandit(*paths: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "bandit", "--quiet", "--recursive", "--configfile", "pyproject.toml", *paths)


def test_bandit_finds_nothing() -> None:
    done = bandit("server", "trm", "training")

    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stderr, done.stderr  # such as a file that it cannot read


def test_bandit_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("import subprocess\nsubprocess.run('ls', shell=True)\n")

    assert bandit(str(tmp_path)).returncode == 1


def test_the_audit_covers_what_is_installed() -> None:
    """Of `make audit` everything but the question itself, which needs the internet."""
    stamp = f"{sys.prefix}/installed-tools"

    done = run("make", f"--old-file={stamp}", "audit", f"VENV={sys.prefix}", "AUDIT_FLAGS=--dry-run")

    assert done.returncode == 0, done.stderr
    count = int(done.stderr.rpartition("would have audited ")[2].split()[0])
    audited = (Path(sys.prefix) / "audited.txt").read_text().splitlines()
    assert count == len(audited)
    for package in ("torch", "uvicorn", "httptools", "pydantic", "safetensors"):
        assert any(line.startswith(f"{package}==") for line in audited), package
