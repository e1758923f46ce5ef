"""The frozen language model: one forward pass for Qwen2, Qwen3 and Llama.

    r = embedding of a token
    each layer:  r = r + attention(norm(r));  r = r + swiglu(norm(r))

What comes out is r, the residual stream before the final norm; `norm` and `lm_head` are for whoever reads it out.
The stream and the norms are float32 or wider, the linear layers in the type of their weights. Where keys and values
lie, and who sees them, is the business of the caller's `KeyValues`: slots of the engine, or whole sequences.
Weights go by other names in files, see `hub_tensors`; transformers' models are the oracle of the tests.

Legend: N positions in any leading shape, D hidden, H heads, K key/value heads, d head size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trm.errors import ConfigError
from trm.layers import KeyValues, Linear, Rope, rotate, signed

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that are one here and several in files, one below the other."""

HUB_NAMES = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "feed_forward": "mlp",
}
"""What modules are called in files, where that is another name."""


class Norm(nn.Module):
    """RMS norm with a weight, in float32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, h: Tensor) -> Tensor:
        wide = h if h.dtype == torch.float64 else h.float()
        return F.rms_norm(wide, wide.shape[-1:], self.weight.to(wide.dtype), self.eps)


class BackboneAttention(nn.Module):
    """Grouped-query attention; Qwen3 scales each head's queries and keys by a norm before they are rotated."""

    def __init__(self, config: Any, head_dim: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        self.head_dim = head_dim
        into, out = _attention_biases(config)
        self.qkv_proj = Linear(config.hidden_size, sum(self.heads) * head_dim, bias=into)
        self.o_proj = Linear(config.num_attention_heads * head_dim, config.hidden_size, bias=out)
        has_norms = config.model_type == "qwen3"
        self.q_norm = Norm(head_dim, config.rms_norm_eps) if has_norms else None
        self.k_norm = Norm(head_dim, config.rms_norm_eps) if has_norms else None

    def forward(self, h: Tensor, rope: Rope, layer: int, key_values: KeyValues) -> Tensor:
        """Store keys and values of h (N, D) and attend; returns (N, D)."""
        projected = self.qkv_proj(h).unflatten(-1, (-1, self.head_dim))  # (N, H + 2 K, d)
        rotated, values = projected.split((self.heads[0] + self.heads[1], self.heads[2]), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = rotated.split(self.heads[:2], dim=-2)
            rotated = torch.cat((self.q_norm(queries), self.k_norm(keys)), dim=-2).to(values.dtype)
        queries, keys = rotate(rotated, rope).split(self.heads[:2], dim=-2)
        key_values.write(layer, keys, values)
        attended = key_values.attend(layer, queries)
        return self.o_proj(attended.flatten(-2))  # type: ignore[no-any-return]


class BackboneFeedForward(nn.Module):
    """SwiGLU with gate and up in one product."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(h).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]


class BackboneLayer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: Any, head_dim: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.attention = BackboneAttention(config, head_dim)
        self.feed_forward_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = BackboneFeedForward(config)

    def forward(self, r: Tensor, rope: Rope, layer: int, key_values: KeyValues) -> Tensor:
        r = r + self.attention(self.attention_norm(r), rope, layer, key_values)
        return r + self.feed_forward(self.feed_forward_norm(r))  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """Embedding, layers, final norm and head of a Qwen2, Qwen3 or Llama; `config` is transformers' own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Sequence[BackboneLayer] = nn.ModuleList(  # type: ignore[assignment]
            BackboneLayer(config, head_dim) for _ in range(config.num_hidden_layers)
        )
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: Any = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # No buffers: rounded to bfloat16 with the weights, they would turn distant positions by radians.
        self.rope_frequencies, self.rope_scale = _rope(config, head_dim)  # (d / 2,)
        self.identity: str | None = None  # fingerprint of the weights as files hold them, where somebody has looked
        self.fingerprints: dict[torch.dtype, str] = {}
        """What `trm.checkpoint.fingerprint` found, by the type of the weights, which are frozen."""

    @classmethod
    def from_transformers(cls, model: PreTrainedModel) -> "Backbone":
        """The same weights as a model of transformers, copied."""
        with torch.device("meta"):
            backbone = cls(model.config)
        backbone.config.architectures = [type(model).__name__]
        state = model.state_dict()
        backbone.load_hub_tensors(lambda name: state[name].clone())
        return backbone

    def to_transformers(self) -> PreTrainedModel:
        """The same weights as a model of transformers, copied."""
        from transformers import AutoModelForCausalLM  # its import imports trm.model, which stands on this module

        model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config).to(self.dtype)
        model.load_state_dict(dict(self.hub_tensors()))
        return model.eval()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.fingerprints.clear()  # another type may have rounded the weights
        return super()._apply(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return self.embed_tokens.weight.dtype

    def rope(self, positions: Tensor) -> Rope:
        """Cosine and signed sine, (N, d), of positions (N,)."""
        angles = positions[..., None].float() * self.rope_frequencies.to(positions.device)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return signed(cos.to(wide), sin.to(wide))

    def forward(self, embedded: Tensor, rope: Rope, key_values: KeyValues) -> Tensor:
        """The residual stream r (N, D) of embedded tokens (N, D), whose keys and values are stored on the way."""
        *_, r = self.streams(embedded, rope, key_values)
        return r

    def streams(self, embedded: Tensor, rope: Rope, key_values: KeyValues) -> Iterator[Tensor]:
        """The same stream as it grows: (N, D) after no layer, after one, … after all."""
        r = embedded if embedded.dtype == torch.float64 else embedded.float()
        yield r
        for index, layer in enumerate(self.layers):
            r = layer(r, rope, index, key_values)
            yield r

    @property
    def is_packed(self) -> bool:
        """Whether the weights were packed for decoding, and are no longer there to be read; see `trm.linear`."""
        return not isinstance(self.layers[0].attention.o_proj, Linear)

    def hub_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by their names in files, views where several are one here; a tied head comes twice."""
        for name, tensor in self.state_dict().items():
            parts = self._parts(name)
            yield from zip((part for part, _ in parts), tensor.split([rows for _, rows in parts]), strict=True)

    def load_hub_tensors(self, read: Callable[[str], Tensor], dtype: torch.dtype | None = None) -> None:
        """Take the weights that `read` gives for the names of files, each read once, in `dtype`, else as they come.

        A tensor that is whole in its file and needs no other type is taken as it is, not copied.
        """
        for name, tensor in self.state_dict().items():
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            parts = [read(part) for part, _ in self._parts(name)]
            if len(parts) == 1:
                whole = parts[0].to(dtype or parts[0].dtype)
            else:
                whole = parts[0].new_empty(tensor.shape, dtype=dtype)
                for window, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
                    window.copy_(part)
            module_name, _, own = name.rpartition(".")
            setattr(self.get_submodule(module_name), own, nn.Parameter(whole, requires_grad=False))
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def hub_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that files must hold."""
        return {
            part: (rows, *tensor.shape[1:])
            for name, tensor in self.state_dict().items()
            for part, rows in self._parts(name)
            if not (name == "lm_head.weight" and self.config.tie_word_embeddings)
        }

    def _parts(self, name: str) -> list[tuple[str, int]]:
        """A weight's names in files, with the rows of each."""
        if self.is_packed:
            raise ConfigError("the weights are packed for decoding; load the model again to save or convert it")
        *modules, layer, own = name.split(".")
        rows = self.get_parameter(name).shape[0]
        path = ".".join([HUB_NAMES.get(module, module) for module in modules])
        prefix = "" if name.startswith("lm_head.") else f"model.{path}." if path else "model."
        names = JOINED.get(layer, (HUB_NAMES.get(layer, layer),))
        if layer == "qkv_proj":
            attention: Any = self.get_submodule(".".join(modules))
            sizes = [heads * attention.head_dim for heads in attention.heads]
        else:
            sizes = [rows // len(names)] * len(names)
        return [(f"{prefix}{part}.{own}", size) for part, size in zip(names, sizes, strict=True)]


def _attention_biases(config: Any) -> tuple[bool, bool]:
    """Whether queries, keys and values have biases, and whether the output has one."""
    if config.model_type == "qwen2":
        return True, False
    return (bool(config.attention_bias),) * 2


def _rope(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Frequencies (d / 2,) in float32, and what cosine and sine are multiplied by."""
    parameters = config.rope_parameters
    with torch.device("cpu"):  # real numbers, even where weights are made without any
        if parameters["rope_type"] != "default":
            frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
            return frequencies, float(scale)
        return 1.0 / parameters["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim), 1.0
