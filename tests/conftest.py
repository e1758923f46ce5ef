"""Small models and tokenizers that every test module may use.

Random decoder weights are scaled so that they disturb the result and yet contract: a decoder
at its zero initialisation would make every cache bug invisible, a chaotic one amplifies rounding.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trm import TRMForCausalLM, bundled_model_path
from trm.chat import ChatFormat

SHARED = Path(__file__).parent.parent.parent / "shared"
BACKBONES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (partial(Qwen3Config, head_dim=16), Qwen3ForCausalLM),  # twice the hidden size over the heads
    "llama": (LlamaConfig, LlamaForCausalLM),
}

torch.set_num_threads(1)  # tiny tensors: more threads only get in each other's way


def shared_path(name: str) -> Path:
    """A file or folder of the workplace's shared data; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs shared/{name}, which is not part of this repository")
    return path


def make_backbone(family: str = "qwen2", seed: int = 0, **sizes: Any) -> Any:
    """A tiny backbone, as transformers has it, with random weights large enough to matter."""
    config_class, model_class = BACKBONES[family]
    settings = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return model_class(config_class(**(settings | sizes))).eval()


@torch.no_grad()
def randomize(model: TRMForCausalLM, scale: float = 0.4, seed: int = 0) -> TRMForCausalLM:
    """Give the decoder's weights a spread of `scale` / sqrt(fan in), the halting head included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.decoder.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.copy_(noise * scale / parameter.shape[-1] ** 0.5)
    return model


def make_model(
    family: str = "qwen2", *, scale: float | None = 0.4, sizes: dict[str, Any] | None = None, **settings: Any
) -> TRMForCausalLM:
    """A tiny TRM model; `scale` None leaves the decoder at its initialisation."""
    depth = {"n_latent": 2, "n_cycles": 2, "n_supervision": 3}
    model = TRMForCausalLM.from_backbone(make_backbone(family, **(sizes or {})), **(depth | settings)).eval()
    return model if scale is None else randomize(model, scale)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The repository's own small tokenizer."""
    return AutoTokenizer.from_pretrained(bundled_model_path())


@pytest.fixture(scope="session")
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat(tokenizer)


def byte_fallback_tokenizer(*pieces: str) -> Any:
    """A tokenizer of Llama 2's kind: `<unk>`, `<s>`, `</s>`, then `pieces`, which may be bytes as in `<0xE2>`."""
    vocabulary = {piece: id_ for id_, piece in enumerate(("<unk>", "<s>", "</s>", *pieces))}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_prefix_space=False
    )


@pytest.fixture(scope="session")
def llama2_tokenizer() -> Any:
    """A small one of Llama 2's kind: the 256 bytes are ids 3 to 258, pieces of text follow."""
    texts = [
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "\u2581\u2581b",
        "\u00e9",
        "\u65e5\u672c",
        "\u2581\u20ac",
        "\ufffd",
        "12",
        "<0x41",
    ]
    tokenizer = byte_fallback_tokenizer(*(f"<0x{byte:02X}>" for byte in range(256)), *texts)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


@pytest.fixture(scope="session")
def qwen2_tokenizer() -> Any:
    """The real Qwen2 tokenizer, where the shared data is at hand."""
    return AutoTokenizer.from_pretrained(shared_path("qwen2-tokenizer"))


@pytest.fixture(params=["context", "state"])
def kv_source(request: pytest.FixtureRequest) -> str:
    return str(request.param)
