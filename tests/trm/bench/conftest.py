"""A small plain backbone with the repository's tokenizer, as a user's directory."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conftest import make_backbone
from trm import bundled_model_path


@pytest.fixture(scope="session")
def backbone_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "backbone"
    tokenizer: Any = AutoTokenizer.from_pretrained(bundled_model_path())
    make_backbone(vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
