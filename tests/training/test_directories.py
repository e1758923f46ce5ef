"""Where a command writes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from training.directories import claim, require_writable
from trm.errors import ConfigError


def test_many_commands_may_try_one_directory_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(require_writable, [tmp_path / "runs"] * 400):
            pass
    assert not list((tmp_path / "runs").iterdir())  # nothing is left of them


def test_a_place_belongs_to_one_command_at_a_time(tmp_path: Path) -> None:
    place = tmp_path / "runs"
    taken = f"--work-dir {place}: another trm-train is at work there; wait for it"
    with claim(place, "trm-train", "--work-dir"):
        for _ in range(2):  # being refused changes nothing
            with pytest.raises(ConfigError, match=taken), claim(place, "trm-train", "--work-dir"):
                pass
    with claim(place, "trm-train"):
        pass
