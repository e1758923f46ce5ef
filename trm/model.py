"""The model: frozen backbone, recursion, heads. Knows no requests.

    r = backbone residual stream before its final norm     x = rms(r)     y = z = 0
    keys and values of f: from c = x, or from a learned mix of such states after several layers of the backbone
    repeat n_supervision:  repeat n_cycles:  n_latent times z = f(x + y + z), then y = f(y + z)
    logits = lm_head(g * rms(y))                            halt = sigmoid(w_h . y + b_h)

`forward` and transformers' `generate` work here; `trm.engine` drives the same pieces
(`encode`, `Decoder.step`, `readout`) one supervision step at a time.
Source: arXiv:2510.04871, with keys and values from the context as an alternative.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from trm import checkpoint
from trm.backbone import Backbone
from trm.cache import CACHE_NAME, CACHE_NAMES, Sequences, grow, one_cache
from trm.config import TRMConfig
from trm.errors import BadRequest, ConfigError
from trm.layers import KeyValues, Layer, Linear, Rope, causal_mask, rms

HALT_BIAS = -5.0  # sigmoid(-5): at first nothing halts
IGNORE_INDEX = -100
HARMLESS = {
    "trust_remote_code",
    "code_revision",
    "low_cpu_mem_usage",
    "use_safetensors",
    "adapter_kwargs",
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "safe_serialization",
    "max_shard_size",
    "save_function",
}
"""Arguments of `from_pretrained` and `save_pretrained` that ask for nothing that is not done, or not wanted, here."""


@dataclass
class TRMOutput(ModelOutput):
    """What `forward` returns. Q is S, or the number of positions kept by `logits_to_keep`.

    logits (B, Q, V) of the last step; halt_logits (B, Q); with return_all_steps,
    all_logits (N, B, Q, V) and all_halt_logits (N, B, Q) hold every step, step 1 first.
    The cache answers to both of its names, as attribute and as key.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    halt_logits: Tensor | None = None
    all_logits: Tensor | None = None
    all_halt_logits: Tensor | None = None

    @property
    def past_key_values(self) -> Cache | None:
        """The cache, by the name that transformers used before 5.24."""
        return self.cache

    @past_key_values.setter
    def past_key_values(self, cache: Cache | None) -> None:
        self.cache = cache

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__("cache" if key in CACHE_NAMES else key, value)

    def __contains__(self, key: object) -> bool:
        return bool(super().__contains__("cache" if key in CACHE_NAMES else key))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("cache" if key in CACHE_NAMES else key)

    def get(self, key: Any, default: Any = None) -> Any:
        """The value under `key`, or `default`."""
        return super().get("cache" if key in CACHE_NAMES else key, default)


class Decoder(nn.Module):
    """The recursion: one shared block of L layers, and the halting head."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.config = config
        backbone = config.backbone_config
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(
                config.hidden_size,
                backbone.num_attention_heads,
                backbone.num_key_value_heads,
                config.head_dim,
                config.intermediate_size,
            )
            for _ in range(config.n_layers)
        )
        self.halt_head = nn.Linear(config.hidden_size, 1)
        sizes = len(config.state_layers), config.hidden_size
        self.context_mix = nn.Parameter(torch.empty(sizes)) if config.context_layers else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the identity: y stays proportional to x, and nothing halts. The context's states weigh the same."""
        for layer in self.layers:
            layer.reset_parameters()
        self.halt_head.weight.zero_()
        self.halt_head.bias.fill_(HALT_BIAS)
        if self.context_mix is not None:
            self.context_mix.fill_(1)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return self.halt_head.weight.dtype

    def write_context(self, states: Tensor, rope: Rope, key_values: KeyValues) -> None:
        """Project keys and values from the backbone's states (N, C, D) and store them, one entry for each layer."""
        context = states[..., -1, :]
        if self.context_mix is not None:  # one after the other: a sum in an order that no other row changes
            context = self.context_mix[0] * states[..., 0, :]
            for index in range(1, len(self.context_mix)):
                context = context + self.context_mix[index] * states[..., index, :]
            context = rms(context)
        for index, layer in enumerate(self.layers):
            key_values.write(index, *layer.attention.keys_values(context, rope))

    def step(
        self, x: Tensor, y: Tensor, z: Tensor, rope: Rope, key_values: KeyValues, grad_cycles: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """One supervision step: n_cycles times (z n_latent times, then y). All (N, D); returns (y, z).

        `key_values`: with keys from the context, what `write_context` stored; with keys from the state, where each
        call stores its own, entries counted from 0 in every step.
        Only the last `grad_cycles` cycles carry gradient (None: all of them).
        The answer update omits x: its absence tells the shared block which job it has.
        """
        config = self.config
        call = 0
        for cycle in range(config.n_cycles):
            with torch.set_grad_enabled(
                torch.is_grad_enabled() and (grad_cycles is None or cycle >= config.n_cycles - grad_cycles)
            ):
                for _ in range(config.n_latent):
                    z = self._block(x + y + z, rope, key_values, call)
                    call += 1
                y = self._block(y + z, rope, key_values, call)
                call += 1
        return y, z

    def halt_logits(self, y: Tensor) -> Tensor:
        """Halting score (N,) before the sigmoid. A sum by rows, which no other row changes."""
        return (y * self.halt_head.weight[0]).sum(-1) + self.halt_head.bias[0]

    def _block(self, h: Tensor, rope: Rope, key_values: KeyValues, call: int) -> Tensor:
        from_state = self.config.kv_source == "state"
        for index, layer in enumerate(self.layers):
            entry = call * len(self.layers) + index if from_state else index
            if from_state:
                key_values.write(entry, *layer.attention.keys_values(h, rope))
            h = layer(h, rope, entry, key_values)
        return h


class TRMForCausalLM(PreTrainedModel, GenerationMixin):
    """A frozen causal language model with a recursive decoder on top, as a transformers model."""

    config_class = TRMConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ("Layer",)

    def __init__(self, config: TRMConfig, backbone: Backbone | None = None) -> None:
        super().__init__(config)
        self.backbone = Backbone(config.backbone_config) if backbone is None else backbone
        self.backbone.requires_grad_(False)
        self.decoder = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False) if config.own_lm_head else None
        self.exact = False  # whether products are the same to the bit in any company; see `trm.linear`
        self.stored: checkpoint.Stored | None = None  # what its files hold, where it was loaded for decoding
        if self.lm_head is not None and isinstance(self.backbone.lm_head, Linear):  # else it is packed, or left out
            self.lm_head.weight.data.copy_(self.backbone.lm_head.weight)
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone: Backbone | PreTrainedModel, **settings: Any) -> Self:
        """A decoder with fresh weights on a loaded backbone; `settings` are fields of TRMConfig."""
        if isinstance(backbone, PreTrainedModel):
            backbone = Backbone.from_transformers(backbone)
        return cls(TRMConfig(backbone_config=backbone.config, **settings), backbone)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *, dtype: Any = torch.float32, **kwargs: Any) -> Self:
        """Load a checkpoint directory or hub id, ready for inference.

        `dtype` applies to decoder and backbone ("auto" means float32 here). Of transformers' other
        arguments `revision`, those of `checkpoint.Hub` and `device_map` (a single device) are understood; the
        configuration is always the checkpoint's own. Raises CheckpointError, and ConfigError for what asks for more.
        """
        revision, device = kwargs.pop("revision", None), _device(kwargs.pop("device_map", None))
        dtype = _dtype(kwargs.pop("torch_dtype", dtype))
        hub: checkpoint.Hub = {name: kwargs.pop(name) for name in checkpoint.Hub.__annotations__ if name in kwargs}  # type: ignore[assignment]
        given = kwargs.pop("config", None)
        _refuse("from_pretrained", kwargs)
        loaded = checkpoint.read(pretrained_model_name_or_path, revision, dtype, hub)
        if isinstance(given, TRMConfig):
            loaded.config.check_same(given)
        model = cls(loaded.config, loaded.backbone)
        model.load_trained(loaded.weights, str(pretrained_model_name_or_path))
        model = model.to(dtype)
        model = model.to(device) if device is not None else model
        model.eval()
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        *,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint directory as `trm.checkpoint` describes it, with the tokenizer if one is given.

        Only the main process writes; `state_dict` replaces the model's own weights. Of transformers' other arguments
        those that ask for more are a ConfigError.
        """
        _refuse("save_pretrained", kwargs)
        if not is_main_process:
            return
        weights = own = self.trained_state()
        if state_dict is not None:
            weights = {name: tensor for name, tensor in state_dict.items() if not name.startswith("backbone.")}
            checkpoint.check_tensors(weights, {name: tensor.shape for name, tensor in own.items()}, "state_dict")
        checkpoint.write(Path(save_directory), self.config, weights, self.backbone, tokenizer)

    def trained_state(self) -> dict[str, Tensor]:
        """The weights that training owns: decoder, and head if it is our own. Everything else is the backbone's."""
        if not isinstance(self.decoder.layers[0].attention.o_proj, Linear):
            raise ConfigError("the weights are packed for decoding; load the model again to save or train it")
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("backbone.")}

    def load_trained(self, weights: dict[str, Tensor], source: str) -> None:
        """Load what `trained_state` gave. Raises CheckpointError naming the first tensor that does not fit."""
        own = self.trained_state()
        checkpoint.check_tensors(weights, {name: tensor.shape for name, tensor in own.items()}, source)
        self.load_state_dict(weights, strict=False)  # all that is missing is the backbone's, which others may be using

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        n_supervision: int | None = None,
        return_all_steps: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
    ) -> TRMOutput:
        """Logits after `n_supervision` steps (default: the trained number; 0 gives the backbone's own).

        input_ids (B, S); attention_mask (B, past + S), 1 for real tokens, padding on either side;
        position_ids (B, S) default to the number of real tokens before each one. labels (B, S) as in
        transformers, -100 ignored. With keys from the context and no labels, the recursion runs at
        the positions of `logits_to_keep` only (an int: the last so many, 0 for all; or their indices).
        `cache` and `past_key_values` are two names of one argument, transformers' own from 5.24 on and before.
        """
        if return_dict is False:
            raise BadRequest("forward returns a TRMOutput only; leave return_dict out", param="return_dict")
        for name, asked in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if asked:
                raise BadRequest(f"forward returns no such output; leave {name} out", param=name)
        steps = self.check_effort(n_supervision)
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise BadRequest(
                "labels need the logits of every position; leave logits_to_keep at 0", param="logits_to_keep"
            )
        cache = one_cache(cache=cache, past_key_values=past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise BadRequest("input_ids or inputs_embeds is needed", param="input_ids")
        batch, length = given.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + length, dtype=torch.long, device=given.device)
        if attention_mask.ndim != 2 or attention_mask.shape[1] != past + length:
            raise BadRequest(
                f"attention_mask has shape {tuple(attention_mask.shape)}; "
                f"it must be ({batch}, {past + length}), past tokens included",
                param="attention_mask",
            )
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        mask = causal_mask(attention_mask, length)
        rope = self.backbone.rope(position_ids)
        embedded = self.backbone.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states = self.encode(embedded, rope, Sequences(mask, cache))
        x = states[..., -1, :]

        first_entry = self.config.backbone_config.num_hidden_layers
        if cache is not None:
            grow(cache, first_entry + self.config.cache_entries(steps))
        kept = self._kept(logits_to_keep, length, x.device)
        key_values = Sequences(mask, cache, first_entry, keep=self.config.kv_source == "context")
        if self.config.kv_source == "context":
            self.decoder.write_context(states, rope, key_values)
            x, rope = x[:, kept], (rope[0][:, kept], rope[1][:, kept])
            key_values = key_values.seen_by(mask[:, :, kept])
            kept = slice(None)

        y, z = (x if steps == 0 else torch.zeros_like(x)), torch.zeros_like(x)
        answers: list[Tensor] = []
        for step in range(steps):
            if self.config.kv_source == "state":
                key_values = Sequences(mask, cache, first_entry + self.config.cache_entries(step))
            y, z = self.decoder.step(x, y, z, rope, key_values)
            if return_all_steps:
                answers.append(y[:, kept])
        y = y[:, kept]
        logits = self.readout(y)
        loss = None
        if labels is not None:
            shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten(), ignore_index=IGNORE_INDEX)
        return TRMOutput(
            loss=loss,
            logits=logits,
            cache=cache,
            halt_logits=self.decoder.halt_logits(y),
            all_logits=torch.stack([self.readout(a) for a in answers]) if answers else None,
            all_halt_logits=torch.stack([self.decoder.halt_logits(a) for a in answers]) if answers else None,
        )

    def encode(
        self, embedded: Tensor, rope: Rope, key_values: KeyValues, layers: Sequence[int] | None = None
    ) -> Tensor:
        """States (N, C, D) of embedded tokens (N, D): the backbone's residual stream after each of `layers`, scaled by
        rms; None for `state_layers`. The last is x.
        """
        layers, streams = layers or self.config.state_layers, self.backbone.streams(embedded, rope, key_values)
        return torch.stack([rms(r) for count, r in enumerate(streams) if count in layers], dim=-2)

    def readout(self, y: Tensor) -> Tensor:
        """Logits (…, V) of answer states y (…, D), through the backbone's final norm weight and the head."""
        return self.head(self.normed(y))  # type: ignore[no-any-return]

    def normed(self, y: Tensor) -> Tensor:
        """What the head reads, (…, D): answer states y (…, D) through the backbone's final norm weight."""
        return self.backbone.norm.weight * rms(y)

    @property
    def head(self) -> Any:
        """The layer from normed states to logits: our own, or the backbone's."""
        return self.backbone.lm_head if self.lm_head is None else self.lm_head

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        """How far the probabilities of two answer states (…, D) are apart: total variation (…), 0 to 1."""
        return variation(self.readout(before), self.readout(after))

    def check_effort(self, n_supervision: int | None) -> int:
        """The number of supervision steps to run. Raises BadRequest beyond the model's maximum."""
        steps = self.config.n_supervision if n_supervision is None else n_supervision
        if not 0 <= steps <= self.config.max_supervision:
            raise BadRequest(
                f"supervision_steps is {steps}; this model takes 0 to {self.config.max_supervision}",
                param="supervision_steps",
            )
        return steps

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate(). Batches must be padded on the left; `n_supervision` sets the effort."""
        _refuse_right_padding(kwargs.get("attention_mask"))
        cache = one_cache(**{name: kwargs.pop(name, None) for name in CACHE_NAMES})
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        return super().generate(inputs, *args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What transformers gives to `forward`, without the tokenizer that is for `stop_strings` only."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("tokenizer", None)
        return inputs

    def _prepare_attention_mask_for_generation(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mask that transformers derives from the pad tokens where none is given."""
        mask: Tensor = super()._prepare_attention_mask_for_generation(*args, **kwargs)
        _refuse_right_padding(mask)
        return mask

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.head  # type: ignore[no-any-return]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: `Decoder` initialises itself, and the backbone comes with its weights."""

    @staticmethod
    def _kept(logits_to_keep: int | Tensor, length: int, device: torch.device) -> Any:
        if isinstance(logits_to_keep, Tensor):
            return logits_to_keep.to(device)
        return slice(max(0, length - logits_to_keep), None) if logits_to_keep else slice(None)


def variation(before: Tensor, after: Tensor) -> Tensor:
    """Total variation (…), 0 to 1, of the probabilities of two sets of logits (…, V)."""
    old, new = (logits.float().softmax(-1) for logits in (before, after))
    return (new - old).abs().sum(-1) / 2


def _refuse_right_padding(mask: Tensor | None) -> None:
    if mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all()):
        raise BadRequest(
            "generate() needs padding on the left; set tokenizer.padding_side = 'left'", param="attention_mask"
        )


def _refuse(method: str, arguments: dict[str, Any]) -> None:
    """Raise ConfigError for arguments of transformers' `method` that ask for something."""
    asked = sorted(name for name, value in arguments.items() if value not in (None, False) and name not in HARMLESS)
    if asked:
        raise ConfigError(f"{method} does not take {', '.join(asked)} for this model")


def _device(device_map: Any) -> Any:
    """The one device that a caller of `from_pretrained` means."""
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, dict):
        raise ConfigError(f"device_map is {device_map}; this model lies on one device: give its name")
    return device_map


def _dtype(dtype: Any) -> torch.dtype:
    """The type that a caller of `from_pretrained` means; "auto" and None are float32 here."""
    found = (
        torch.float32 if dtype in (None, "auto") else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    )
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype {dtype!r} does not exist in torch")
    return found


AutoModelForCausalLM.register(TRMConfig, TRMForCausalLM)
