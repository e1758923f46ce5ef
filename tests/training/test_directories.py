"""Where a command writes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training.directories import require_writable


def test_many_commands_may_try_one_directory_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(require_writable, [tmp_path / "runs"] * 400):
            pass
    assert not list((tmp_path / "runs").iterdir())  # nothing is left of them
