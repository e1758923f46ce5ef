"""Helpers of the model's and the engine's tests: prompts, padding, the near-tie rule, small checkpoints."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import make_backbone, make_model
from trm import TRMForCausalLM, reference
from trm.chat import ChatFormat
from trm.checkpoint import backbone_record, read_backbone
from trm.engine import SamplingParams
from trm.engine.request import Grammar

NEAR_TIE = 1e-3  # DESIGN section 3: scores closer than this may come out either way in float32
END = 2
DTYPES = pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [(torch.float32, 0.4, 2e-4), (torch.float64, 1.0, 1e-9)],
    ids=["float32", "float64"],
)


def some_prompt(length: int, seed: int = 0, vocab_size: int = 400) -> list[int]:
    """Random ordinary tokens: neither padding nor the end of a turn."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    ids: list[int] = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
    return ids


def pad_left(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """(B, S) ids and mask, padding before the prompts."""
    width = max(map(len, prompts))
    ids = [[*[pad] * (width - len(prompt)), *prompt] for prompt in prompts]
    mask = [[*[0] * (width - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def pad_right(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """(B, S) ids and mask, padding after the prompts."""
    width = max(map(len, prompts))
    ids = [[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts]
    mask = [[*[1] * len(prompt), *[0] * (width - len(prompt))] for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def assert_same_tokens(tokens: Sequence[int], solo: reference.ReferenceReply, near_tie: float = 0.0) -> None:
    """Equal replies, except after a token that the solo run itself chose by less than `near_tie`."""
    if tuple(tokens) == solo.token_ids:
        return
    pairs = zip(tokens, solo.token_ids, strict=False)
    first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    assert first is not None, f"one reply goes on where the other ends: {tuple(tokens)} and {solo.token_ids}"
    assert solo.gaps[first] < near_tie, (
        f"token {first} is {tokens[first]}, alone {solo.token_ids[first]}, which won by {solo.gaps[first]:.2g}"
    )


def generate(model: TRMForCausalLM, ids: Tensor, mask: Tensor | None, **options: Any) -> list[list[int]]:
    """New tokens of every row."""
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, **(settings | options))
    rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return rows


def alone(model: TRMForCausalLM, prompt: Sequence[int], max_tokens: int, end: int | None = None, **params: Any) -> Any:
    """The reference's reply."""
    return reference.decode(model, prompt, SamplingParams(max_tokens=max_tokens, **params), end)


def vary_norms(backbone: Any) -> Any:
    """Give the backbone's norms weights other than one, or forgetting them would go unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return backbone


def widen_norms(model: Any) -> Any:
    """Let the norms of transformers' model compute in float64 where they are given it, not in float32 as ever."""
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = functools.partial(_wide_norm, norm)
    return model


def _wide_norm(norm: Any, h: Tensor) -> Tensor:
    return norm.weight * h / (h.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()  # type: ignore[no-any-return]


@functools.cache
def exact_model(kv_source: str) -> TRMForCausalLM:
    """A float64 model of 16 tokens: rounding cannot hide a bug, and replies end now and then. Not to be changed."""
    sizes = {"vocab_size": 16, "num_hidden_layers": 1}
    depth = {"n_latent": 1, "n_cycles": 2, "n_supervision": 2, "max_supervision": 4}
    return make_model(kv_source=kv_source, scale=1.0, sizes=sizes, **depth).double()


@functools.cache
def solo(
    kv_source: str, prompt: tuple[int, ...], params: SamplingParams, grammar: Grammar | None = None
) -> reference.ReferenceReply:
    """What `exact_model` says to one prompt when it is alone in the world."""
    return reference.decode(exact_model(kv_source), prompt, params, END, grammar)


@pytest.fixture
def make_checkpoint(tmp_path: Path, tokenizer: Any) -> Any:
    """A function that writes a small checkpoint and returns its directory and the model."""

    def make(name: str = "checkpoint", **settings: Any) -> tuple[Path, TRMForCausalLM]:
        model = make_model(**settings)
        model.save_pretrained(tmp_path / name, tokenizer)
        return tmp_path / name, model

    return make


@pytest.fixture
def make_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same with a backbone that is recorded, not copied; returns checkpoint, backbone directory and model."""

    def make() -> tuple[Path, Path, TRMForCausalLM]:
        source = tmp_path / "their-backbone"
        make_backbone().save_pretrained(source)
        backbone = read_backbone(source)
        monkeypatch.setattr("trm.checkpoint.MAX_COPIED_BACKBONE_BYTES", 10)
        model = TRMForCausalLM.from_backbone(backbone, n_supervision=2, **backbone_record(source, None, backbone))
        model.save_pretrained(tmp_path / "checkpoint")
        return tmp_path / "checkpoint", source, model

    return make


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; a value of ... removes its key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def chat_with(tokenizer: Any, end_id: int) -> ChatFormat:
    """A chat format whose replies end with `end_id`."""
    chat = ChatFormat(tokenizer)
    chat.end_id = end_id
    return chat


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Without the graph that nobody asks for."""
    with torch.no_grad():
        yield
