"""What a run that goes on elsewhere still finds."""

from pathlib import Path

import pytest

from training.config import TrainSettings
from training.resuming import with_absolute_paths


def test_files_become_absolute_and_data_sets_keep_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gsm8k", "math", "synthetic", "synthetic:have"):
        Path(name).mkdir()
    Path("rows.jsonl").touch()

    for dataset, validation in (("gsm8k", "math"), ("synthetic", "synthetic:have"), ("rows.jsonl", None)):
        given = TrainSettings(dataset=dataset, validation=validation, backbone="gsm8k")
        found = with_absolute_paths(given)
        is_file = dataset == "rows.jsonl"
        assert (found.dataset, found.validation) == (str(tmp_path / dataset) if is_file else dataset, validation)
        assert found.backbone == str(tmp_path / "gsm8k")  # no name of a backbone
