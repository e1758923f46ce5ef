"""What `trm-bench decode` and `trm-bench peers` can be told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field

from trm.settings import Settings

Shape = Literal["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"]


def _qwen2_5(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 151_936 if tied else 152_064,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": tied,
    }


SHAPES: Mapping[str, dict[str, Any]] = dict(
    zip(
        get_args(Shape),
        (
            _qwen2_5(896, 4864, 24, 14, 2, True),
            _qwen2_5(1536, 8960, 28, 12, 2, True),
            _qwen2_5(2048, 11_008, 36, 16, 2, True),
            _qwen2_5(3584, 18_944, 28, 28, 4, False),
        ),
        strict=True,
    )
)
"""Sizes of backbones whose speed can be measured with random weights."""


class _ModelSettings(Settings):
    """Which model is measured, in which precision."""

    model: str | None = Field(
        None, description="checkpoint or backbone directory, or hub id; default the bundled model"
    )
    shape: Shape | None = Field(None, description="instead of a model, random weights of this shape")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="precision, as for trm-serve")
    quantize: Literal["int8", "fp8"] | None = Field(None, description="hold the backbone's linear layers in 8 bits")
    repeats: int = Field(3, ge=1, description="timed runs of each kind, in turn, after a warm-up; the median counts")
    num_threads: int = Field(2, ge=1, description="CPU threads for decoding")
    seed: int = Field(0, ge=0, description="seed of the requests")


class DecodeSettings(_ModelSettings):
    """Measure decoding: the engine against generate(), lockstep, full depth, the machine, itself without drafts."""

    command: ClassVar[str] = "trm-bench decode"

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    num_requests: int = Field(64, ge=2, description="requests to decode; fewer where that would take for ever")
    max_rows: int = Field(32, ge=1, description="rows decoded together")
    full: bool = Field(False, description="also measure the cost of a token against the length of its context")


class PeersSettings(_ModelSettings):
    """Measure the engine against transformers' generate() and llama.cpp on a CPU, on the same requests."""

    command: ClassVar[str] = "trm-bench peers"

    quantize: Literal["int8"] | None = Field(None, description="hold the backbone's linear layers in 8 bits")
    gguf: Path | None = Field(None, description="the same backbone as a GGUF file, for llama.cpp")
    num_requests: int = Field(32, ge=2, description="requests decoded together; one alone is measured too")
    max_tokens: int = Field(128, ge=8, description="length of the longest reply, and of the one decoded alone")
    effort: int | None = Field(None, ge=0, description="supervision steps beside 0; default the trained number")

    @property
    def max_rows(self) -> int:
        """Rows decoded together."""
        return self.num_requests
