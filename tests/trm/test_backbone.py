"""The backbone's forward pass against transformers' own models, in every variety that is supported, and its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conftest import make_backbone
from tests.trm.conftest import some_prompt, widen_norms
from trm import checkpoint
from trm.backbone import Backbone
from trm.cache import Sequences
from trm.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from trm.config import BACKBONES, ROPE_TYPES
from trm.errors import CheckpointError
from trm.layers import causal_mask

IDS = torch.tensor([some_prompt(90), some_prompt(90, seed=1)])

VARIETIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-one-key-head": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2-ungrouped-tied": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-biased-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-one-key-head": ("qwen3", {"num_key_value_heads": 1, "head_dim": 4}),
    "qwen3-ungrouped": ("qwen3", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama": ("llama", {}),
    "llama-biased-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-one-key-head": ("llama", {"num_key_value_heads": 1, "head_dim": 12, "mlp_bias": True}),
    "llama-ungrouped": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "num_hidden_layers": 3}),
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 1e6},
    "linear": {"factor": 4.0},
    "llama3": {
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "yarn with an attention factor": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.7,
        "beta_fast": 16.0,
    },
    "yarn with scales": {
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
}

pytestmark = pytest.mark.usefixtures("no_gradients")

each_variety = pytest.mark.parametrize("variety", VARIETIES)
exactly = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)


def make(family: str, **sizes: Any) -> Any:
    """transformers' model, whose norms and biases, ones and zeros at first, have random weights as well."""
    model = make_backbone(family, **sizes)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def make_variety(variety: str) -> Any:
    family, sizes = VARIETIES[variety]
    return make(family, **sizes)


def logits(backbone: Backbone, ids: Tensor = IDS) -> Tensor:
    """(B, S, V) of whole rows without padding."""
    rope = backbone.rope(torch.arange(ids.shape[1]).expand(ids.shape))
    mask = causal_mask(torch.ones_like(ids), ids.shape[1])
    return backbone.lm_head(backbone.norm(backbone(backbone.embed_tokens(ids), rope, Sequences(mask))))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


# The forward pass


def test_every_family_and_rope_type_is_compared() -> None:
    assert {family for family, _ in VARIETIES.values()} == set(BACKBONES)
    assert {name.split()[0] for name in ROPES} == set(ROPE_TYPES)


@exactly
@each_variety
def test_logits_are_those_of_transformers(variety: str, dtype: torch.dtype, tolerance: float) -> None:
    theirs = widen_norms(make_variety(variety).to(dtype))

    assert error(logits(Backbone.from_transformers(theirs)), theirs(IDS).logits) < tolerance


@exactly
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", BACKBONES)
def test_scaled_positions_are_those_of_transformers(
    family: str, rope: str, dtype: torch.dtype, tolerance: float
) -> None:
    parameters = {"rope_type": rope.split()[0], "rope_theta": 10000.0} | ROPES[rope]
    theirs = widen_norms(make(family, rope_parameters=parameters, max_position_embeddings=512).to(dtype))
    ours = Backbone.from_transformers(theirs)

    assert error(logits(ours), theirs(IDS).logits) < tolerance
    if rope != "default":
        plain = Backbone.from_transformers(make(family).to(dtype))
        assert error(logits(plain), theirs(IDS).logits) > 1e-2, "the scaling must matter here"


def test_bfloat16_weights_keep_a_float32_stream() -> None:
    """So it comes closer to the exact result than transformers, whose stream is bfloat16."""
    theirs = make("qwen2", num_hidden_layers=8).to(torch.bfloat16)
    ours = Backbone.from_transformers(theirs)
    got, rounded = logits(ours), theirs(IDS).logits

    expected = logits(ours.double())

    assert (got - expected).abs().mean() < 0.8 * (rounded - expected).abs().mean()


def test_dropout_of_the_configuration_is_for_training_the_backbone_only() -> None:
    theirs = make("llama", attention_dropout=0.5)
    ours = Backbone.from_transformers(theirs).train()

    assert error(logits(ours), theirs.eval()(IDS).logits) < 1e-5


# Names and files


@each_variety
def test_weights_go_to_transformers_and_back(variety: str) -> None:
    theirs = make_variety(variety)
    ours = Backbone.from_transformers(theirs)
    state = theirs.state_dict()

    back = ours.to_transformers()

    assert back.state_dict().keys() == state.keys() == dict(ours.hub_tensors()).keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.hub_tensors())
    tied = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    assert ours.hub_shapes() == {name: tuple(t.shape) for name, t in state.items() if name not in tied}
    assert torch.equal(back(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["one-file", "shards"])
@each_variety
def test_files_of_transformers_are_read(variety: str, shard_size: str, tmp_path: Path) -> None:
    theirs = make_variety(variety)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")

    ours = checkpoint.read_backbone(tmp_path)

    assert not any(parameter.is_meta or parameter.requires_grad for parameter in ours.parameters())
    assert not ours.training
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.hub_tensors())
    assert (ours.lm_head.weight is ours.embed_tokens.weight) == theirs.config.tie_word_embeddings


@each_variety
def test_transformers_reads_our_files(variety: str, tmp_path: Path) -> None:
    theirs = make_variety(variety)

    checkpoint.write_backbone(tmp_path, Backbone.from_transformers(theirs))

    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is type(theirs)
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_files_of_a_model_without_head_are_read(tmp_path: Path) -> None:
    """They lack the prefix `model.`; a head that is not tied to the embedding is then missing."""
    for tied in (True, False):
        theirs = make("qwen3", tie_word_embeddings=tied)
        theirs.model.save_pretrained(tmp_path / str(tied))
        assert "norm.weight" in load_file(tmp_path / str(tied) / WEIGHTS_FILE)

    ours = checkpoint.read_backbone(tmp_path / "True")

    assert error(logits(ours), make("qwen3", tie_word_embeddings=True)(IDS).logits) < 1e-5
    with pytest.raises(CheckpointError, match=r"1 tensors are missing or misshapen, lm_head.weight first"):
        checkpoint.read_backbone(tmp_path / "False")


@pytest.mark.parametrize(
    ("variety", "name"),
    [
        ("qwen2", "model.layers.1.self_attn.q_proj.bias"),
        ("qwen2", "lm_head.weight"),
        ("qwen3", "model.layers.0.self_attn.k_norm.weight"),
        ("qwen3", "model.layers.1.input_layernorm.weight"),
        ("llama", "model.layers.0.mlp.gate_proj.weight"),
        ("llama-biased-tied", "model.layers.0.self_attn.o_proj.bias"),
        ("llama-biased-tied", "model.embed_tokens.weight"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "too short", "of another rank"])
def test_what_does_not_fit_is_named(variety: str, name: str, damage: str, tmp_path: Path) -> None:
    make_variety(variety).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    whole = tensors.pop(name)
    if damage != "missing":
        tensors[name] = whole[:-1].clone() if damage == "too short" else whole[None].clone()
    save_file(tensors, tmp_path / WEIGHTS_FILE)

    with pytest.raises(CheckpointError, match=f"1 tensors are missing or misshapen, {name} first"):
        checkpoint.read_backbone(tmp_path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_that_are_not_finite_are_named(number: float, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = make("qwen2").to(dtype)
    theirs.model.layers[1].mlp.up_proj.weight[5, 7] = number
    theirs.save_pretrained(tmp_path)

    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight holds numbers that are not finite"):
        checkpoint.read_backbone(tmp_path)


@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float32], ids=str)
def test_what_needs_no_other_type_stays_a_window_into_its_file(wanted: torch.dtype | None, tmp_path: Path) -> None:
    theirs = make("qwen2").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)

    ours = checkpoint.read_backbone(tmp_path, None, wanted)

    assert {parameter.dtype for parameter in ours.parameters()} == {wanted or torch.bfloat16}
    windows = {name for name, tensor in ours.state_dict().items() if _lies_in(tensor, tmp_path / WEIGHTS_FILE)}
    whole = {name for name in ours.state_dict() if "qkv_proj" not in name and "gate_up_proj" not in name}
    assert windows == (set() if wanted == torch.float32 else whole)
    assert all(torch.equal(tensor, theirs.state_dict()[name].to(ours.dtype)) for name, tensor in ours.hub_tensors())


def _lies_in(tensor: Tensor, path: Path) -> bool:
    """Whether the kernel maps the file where the tensor lies."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, file = line.split(maxsplit=5)
        first, end = (int(address, 16) for address in addresses.split("-"))
        if file == str(path) and first <= tensor.data_ptr() < end:
            return True
    return False


def test_a_file_without_a_type_of_its_own_in_the_configuration(tmp_path: Path) -> None:
    """The configuration then says what was read, as it does where it said something else."""
    make("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({k: v for k, v in content.items() if k != "dtype"}))

    assert checkpoint.read_backbone(tmp_path, None, None).config.dtype == torch.bfloat16
    assert checkpoint.read_backbone(tmp_path).config.dtype == torch.float32
