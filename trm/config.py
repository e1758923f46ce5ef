"""What the weights decide: sizes, depth, and where keys and values come from.

Depth counts here, once: calls per step, cache entries per step. Raises ConfigError for
combinations that the decoder cannot compute exactly.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from trm.chat import SYSTEM_PROMPTS
from trm.errors import ConfigError

BACKBONES = ("qwen2", "qwen3", "llama")  # what `trm.backbone` computes
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the batch's longest row
KV_SOURCES = ("context", "state")
EFFORT_NAMES = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@strict
class TRMConfig(PreTrainedConfig):
    """Configuration of `TRMForCausalLM`.

    n_latent, n_cycles, n_supervision: the paper's n, T and N_sup. n_layers: layers L of the
    shared block. expansion: SwiGLU width over 1.5 times the hidden size. kv_source: "context"
    or "state". context_layers: the context is a learned mix of the backbone's states after each of
    these numbers of layers (0: the embeddings), of which the last is all; None: after all alone.
    max_supervision: deepest effort that may be asked for, None for 4 * n_supervision
    but at least 16. own_lm_head: the head was trained and is stored with the decoder.
    work: how much replies showed before their answers in training, see `trm.chat.Work`; None: all of it.
    normalize_text: prompts were normalised in training. backbone_source, backbone_revision,
    backbone_fingerprint: where the frozen weights come from, None where they lie in `backbone/`.
    """

    model_type = "trm"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - transformers reads a plain class attribute

    backbone_config: Any = None
    n_latent: int = 6
    n_cycles: int = 3
    n_supervision: int = 16
    n_layers: int = 1
    expansion: float = 4.0
    kv_source: str = "context"
    context_layers: list[int] | None = None
    max_supervision: int | None = None
    own_lm_head: bool = False
    work: list[str] | None = None
    normalize_text: bool = True
    backbone_source: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone_config, dict):
            known = dict(self.backbone_config)
            architecture = known.pop("model_type", None)
            if architecture not in BACKBONES:
                raise _unknown_backbone(architecture)
            self.backbone_config = AutoConfig.for_model(architecture, **known)
        if self.backbone_config is None:
            self.backbone_config = AutoConfig.for_model("qwen2")
        self.context_layers = self.context_layers or None
        if not self.work:
            self.work = ["full"]
        self._check()
        backbone = self.backbone_config
        self.vocab_size = backbone.vocab_size
        self.hidden_size = backbone.hidden_size
        self.max_position_embeddings = backbone.max_position_embeddings
        if self.max_supervision is None:
            self.max_supervision = max(16, 4 * self.n_supervision)
        # generate() sizes its cache by this: the backbone's layers, then the recursion's entries.
        self.num_hidden_layers = backbone.num_hidden_layers + self.cache_entries(self.n_supervision)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(backbone, name, None))
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        backbone = self.backbone_config
        if backbone.model_type not in BACKBONES:
            raise _unknown_backbone(backbone.model_type)
        if "sliding_attention" in (getattr(backbone, "layer_types", None) or ()):
            raise ConfigError(
                "the backbone uses sliding-window attention, which the decoder does not support; "
                "set use_sliding_window to false"
            )
        if (activation := getattr(backbone, "hidden_act", "silu")) != "silu":
            raise ConfigError(f"the backbone's activation is {activation!r}; supported: 'silu'")
        rope = (getattr(backbone, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope not in ROPE_TYPES:
            raise ConfigError(
                f"rope type {rope!r} is not supported, as it makes a row depend on its batch; "
                f"supported: {', '.join(ROPE_TYPES)}"
            )
        for name in ("n_latent", "n_cycles", "n_supervision", "n_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.expansion < float("inf"):
            raise ConfigError(f"expansion is {self.expansion}; it must be above 0")
        if self.kv_source not in KV_SOURCES:
            raise ConfigError(f"kv_source is {self.kv_source!r}; it must be one of {', '.join(KV_SOURCES)}")
        if unknown := [work for work in self.work or () if work not in SYSTEM_PROMPTS]:
            raise ConfigError(f"work holds {unknown[0]!r}; it may hold {', '.join(SYSTEM_PROMPTS)}")
        layers, last = self.state_layers, backbone.num_hidden_layers
        if layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] != last:
            raise ConfigError(f"context_layers is {layers}; it must rise from at least 0 to {last}, the whole backbone")
        if len(layers) > 1 and self.kv_source != "context":
            raise ConfigError(f"context_layers is {layers}: with kv_source {self.kv_source!r} there is no context")
        if self.max_supervision is not None and self.max_supervision < self.n_supervision:
            raise ConfigError(f"max_supervision {self.max_supervision} is below n_supervision {self.n_supervision}")

    def check_same(self, other: "TRMConfig") -> None:
        """Raise ConfigError where `other`, which a caller of `from_pretrained` gives, is not the checkpoint's own."""
        for name in TRMConfig.__annotations__.keys() - {"backbone_config"}:
            own, given = getattr(self, name), getattr(other, name)
            if given != own:
                raise ConfigError(
                    f"{name} is {given!r} in the given configuration, but {own!r} in the checkpoint's own, which holds"
                )

    @property
    def head_dim(self) -> int:
        """Size of one attention head, the backbone's."""
        backbone = self.backbone_config
        return int(getattr(backbone, "head_dim", None) or backbone.hidden_size // backbone.num_attention_heads)

    @property
    def intermediate_size(self) -> int:
        """SwiGLU width: expansion * D * 2/3, rounded up to a multiple of 64."""
        return -(-int(self.expansion * self.hidden_size * 2 / 3) // 64) * 64

    @property
    def state_layers(self) -> list[int]:
        """After how many layers of the backbone each of a token's C states stands; the last is x."""
        return self.context_layers or [self.backbone_config.num_hidden_layers]

    @property
    def calls_per_step(self) -> int:
        """Calls of the shared block in one supervision step: T * (n + 1)."""
        return self.n_cycles * (self.n_latent + 1)

    def cache_entries(self, n_supervision: int) -> int:
        """Key/value entries for `n_supervision` steps: one per call with "state", one per layer with "context"."""
        calls = n_supervision * self.calls_per_step if self.kv_source == "state" else 1
        return calls * self.n_layers

    def effort_steps(self, effort: str) -> int:
        """Supervision steps of a named effort. Raises ConfigError for a name that is none."""
        n = self.n_supervision
        steps = {
            "none": 0,
            "minimal": 1,
            "low": -(-n // 4),
            "medium": -(-n // 2),
            "high": n,
            "xhigh": -(-3 * n // 2),
            "max": 2 * n,
        }
        if effort not in steps:
            raise ConfigError(f"effort {effort!r} is not one of {', '.join(EFFORT_NAMES)}")
        return steps[effort]


def _unknown_backbone(architecture: str | None) -> ConfigError:
    return ConfigError(f"backbone architecture {architecture!r} is not supported; supported: {', '.join(BACKBONES)}")


AutoConfig.register("trm", TRMConfig)
