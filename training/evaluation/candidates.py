"""What is evaluated: the model, and what it is measured against. Loads them for decoding and knows them again."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trm import TRMForCausalLM, checkpoint
from trm.chat import ChatFormat
from trm.loading import DTYPES, load_for_decoding, prepare_for_decoding
from trm.voting import VOTING_TEMPERATURE

Role = Literal["model", "baseline", "control"]
MODEL_NAME = "model"
CONTROL_FILE = "control.json"
DECIDING_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*.safetensors")


@dataclass(frozen=True)
class Run:
    """One way of answering every problem: greedily, or with `samples` replies drawn at a temperature."""

    candidate: str
    effort: int
    samples: int = 0
    temperature: float = VOTING_TEMPERATURE
    top_p: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """A model directory and the runs to make with it. The model goes by MODEL_NAME, others by the end of their path."""

    role: Role
    name: str
    directory: Path
    runs: tuple[Run, ...]

    @property
    def compute(self) -> Any:
        """What `control.json` says it cost to make, if there is one."""
        path = self.directory / CONTROL_FILE
        return checkpoint.read_json(path).get("compute") if path.is_file() else None


def load(
    directory: Path, device: str, dtype: str = "float32", quantize: str | None = None
) -> tuple[TRMForCausalLM, ChatFormat]:
    """A checkpoint of ours, or a plain causal model, which at effort 0 answers as itself; `dtype` is one of DTYPES."""
    tokenizer = checkpoint.read_tokenizer(directory)
    if checkpoint.is_recursive(directory):
        model = load_for_decoding(directory, device=device, dtype=dtype, quantize=quantize)
    else:
        small = {"n_latent": 1, "n_cycles": 1, "n_supervision": 1}
        backbone = checkpoint.read_backbone(directory, dtype=DTYPES[dtype])
        model = TRMForCausalLM.from_backbone(backbone, **small).to(device=device, dtype=DTYPES[dtype])
        prepare_for_decoding(model, quantize)
    return model, ChatFormat(tokenizer, model.config.normalize_text)


def read_chat(directory: Path) -> tuple[ChatFormat, int]:
    """How `load` would encode for a model, and how many positions that has."""
    tokenizer = checkpoint.read_tokenizer(directory)
    if not checkpoint.is_recursive(directory):
        return ChatFormat(tokenizer), checkpoint.read_backbone_config(directory).max_position_embeddings
    config = checkpoint.read_config(directory)
    return ChatFormat(tokenizer, config.normalize_text), config.max_position_embeddings


def fingerprint(directory: Path) -> str:
    """First 16 hex digits of a SHA-256 over the files that decide what a model answers."""
    digest = hashlib.sha256()
    for part in (directory, directory / checkpoint.BACKBONE_DIR):
        for file in sorted(file for pattern in DECIDING_FILES for file in part.glob(pattern)):
            with file.open("rb") as content:
                digest.update(f"{file.relative_to(directory)}:".encode())
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]
