"""A backbone in one GGUF file, as llama.cpp and Ollama have it: configuration, tensors and tokenizer as the hub's.

transformers reads the header, the `gguf` package (the extra `gguf`) the quantized numbers; both are imported only
where such a file is read. transformers' own way to a model is not taken: it drops the scaling of RoPE and the biases
of a Llama, takes Qwen3's head size for 128, and cuts texts otherwise than Llama 3, SmolLM2 and DeepSeek do.
What is not computed is refused by name, never left out: an architecture, a field, a tensor, a way to split words.
Raises CheckpointError with the file and the reason.
"""

from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from trm import extra
from trm.backbone import Backbone
from trm.config import BACKBONES
from trm.errors import CheckpointError

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Modules in the file and on the hub; those of layers come after `blk.N.` there, after `model.layers.N.` here."""

ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3's frequencies are divided by, (d / 2,)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned")
KNOWN = {
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base", *SCALING),
}
"""Fields of attention and RoPE that are read; any other would change what the model computes."""

WHOLE_WORDS = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "tekken",
}
"""Ways to split after which a word that is a token stays whole, whatever the merges say."""
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # kinds of tokens
ROWS = 4096  # of a tensor that are made numbers at once


class GGUFTensor(NamedTuple):
    """Where a tensor lies in the file; asked like a slice of a safetensors file."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # a GGMLQuantizationType
    start: int

    @property
    def bytes_per_row(self) -> int:
        """Of the last dimension."""
        from gguf import GGML_QUANT_SIZES

        numbers, size = GGML_QUANT_SIZES[self.kind]
        return int(self.shape[-1] // numbers * size)

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        """BF16, F16 or F32 as in a safetensors file; quantized numbers become F32."""
        return str(self.kind.name) if self.kind.name in ("BF16", "F16") else "F32"


class GGUFFile:
    """An open file: its `config`, as transformers has it, and its tensors, read like an open safetensors file's."""

    def __init__(self, path: Path) -> None:
        extra.require("gguf", f"{path}: reading a GGUF file", "pip install 'qwen-trm[gguf]'; in a clone, '.[gguf]'")
        self.path = path
        self._bytes, self.fields, self._tensors = _read_header(path)
        self.architecture = self.fields["general.architecture"]
        if self.architecture not in BACKBONES:
            raise self._error(f"its architecture is {self.architecture}; supported: {', '.join(BACKBONES)}")
        if self.fields.get("split.count", 1) not in (0, 1):
            raise self._error(
                f"is one of {self.fields['split.count']} parts of a model; join them with llama-gguf-split --merge"
            )
        own = f"{self.architecture}."
        fields = sorted(name.removeprefix(own) for name in self.fields if name.startswith(own))
        unknown = [name for name in fields if name.startswith(("attention.", "rope.")) and name not in KNOWN]
        if unknown:
            raise self._error(f"its field {own}{unknown[0]} is not known, and may change what the model computes")
        layers = sum(name.endswith(".attn_q.weight") for name in self._tensors)
        if self._field("block_count") != layers:
            raise self._error(f"{own}block_count is {self._field('block_count')}, and it has {layers} layers")
        try:
            self.config = self._config()
            with torch.device("meta"):
                expected = Backbone(self.config).hub_shapes()
        except CheckpointError:
            raise
        except Exception as error:  # the library validates with many kinds of error
            raise self._error(f"has no usable configuration: {error}") from error
        self._by_hub_name = {_hub_name(name): tensor for name, tensor in self._tensors.items() if name != ROPE_FACTORS}
        foreign = sorted(tensor.name for name, tensor in self._by_hub_name.items() if name not in expected)
        if foreign:
            raise self._error(f"its tensor {foreign[0]} has no place in a {self.architecture} model")

    def keys(self) -> list[str]:
        """The tensors' names on the hub."""
        return list(self._by_hub_name)

    def get_slice(self, name: str) -> GGUFTensor:
        return self._by_hub_name[name]

    def get_tensor(self, name: str) -> Tensor:
        """A tensor as the hub has it, in float32."""
        tensor = self._read(self._by_hub_name[name])
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        module = name.split(".")[-2]
        if self.architecture == "llama" and module in heads:
            # llama.cpp rotates neighbours; the hub has the first halves of all pairs, then the second ones.
            tensor = tensor.unflatten(0, (heads[module], -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor

    def _read(self, tensor: GGUFTensor) -> Tensor:
        """Made numbers a few rows at a time: the library needs twice a result's room."""
        from gguf import dequantize

        rows = prod(tensor.shape[:-1])
        end = tensor.start + rows * tensor.bytes_per_row
        data = self._bytes[tensor.start : end].reshape(rows, tensor.bytes_per_row)
        numbers = np.empty((rows, tensor.shape[-1]), np.float32)
        try:
            for first in range(0, rows, ROWS):
                numbers[first : first + ROWS] = dequantize(data[first : first + ROWS], tensor.kind)
        except NotImplementedError:
            raise self._error(f"tensor {tensor.name} is of type {tensor.kind.name}, which is not read") from None
        return torch.from_numpy(numbers.reshape(tensor.shape))

    def _config(self) -> Any:
        """transformers' configuration of the same model."""
        tokens = {name: self.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
        heads = self._field("attention.head_count")
        head_dim = self._field("attention.key_length", self._field("embedding_length") // heads)
        for name in ("attention.value_length", "rope.dimension_count"):
            if (size := self._field(name, head_dim)) != head_dim:
                raise self._error(f"its {self.architecture}.{name} is {size}, and a head's size is {head_dim}")
        settings = {
            "vocab_size": self._tensors["token_embd.weight"].shape[0],
            "hidden_size": self._field("embedding_length"),
            "intermediate_size": self._field("feed_forward_length"),
            "num_hidden_layers": self._field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("attention.head_count_kv", heads),
            "max_position_embeddings": self._field("context_length"),
            "rms_norm_eps": self._field("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope_parameters(),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": tokens["bos"],
            "eos_token_id": tokens["eos"],
            "pad_token_id": tokens["padding"],
        }
        if self.architecture == "qwen2" and head_dim * heads != settings["hidden_size"]:
            raise self._error(f"its {heads} heads of size {head_dim} do not add up to {settings['hidden_size']}")
        if self.architecture != "qwen2":
            settings |= {"head_dim": head_dim, "attention_bias": "blk.0.attn_q.bias" in self._tensors}
        if self.architecture == "llama":
            settings["mlp_bias"] = "blk.0.ffn_gate.bias" in self._tensors
        config = AutoConfig.for_model(self.architecture, **settings)
        if ROPE_FACTORS in self._tensors:
            self._check_factors(config, head_dim)
        return config

    def _rope_parameters(self) -> dict[str, Any]:
        theta = self._field("rope.freq_base", 10000.0)
        kind = self._field("rope.scaling.type", "none")
        if ROPE_FACTORS in self._tensors:
            if kind != "none":
                raise self._error(f"its RoPE has factors of its own, and is scaled by {kind} as well")
            factor = _shortest(self._read(self._tensors[ROPE_FACTORS]).max().item())
            return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind not in ("linear", "yarn"):
            raise self._error(f"its {self.architecture}.rope.scaling.type is {kind}; supported: none, linear, yarn")
        scaled = {"rope_type": kind, "rope_theta": theta, "factor": self._field("rope.scaling.factor")}
        if kind == "yarn":
            scaled["original_max_position_embeddings"] = self._field("rope.scaling.original_context_length")
        return scaled

    def _check_factors(self, config: Any, head_dim: int) -> None:
        """A file holds what Llama 3's scaling came to, not its settings; all models have had the same ones so far."""
        plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
        with torch.device("meta"):
            frequencies = Backbone(config).rope_frequencies
        found = self._read(self._tensors[ROPE_FACTORS])
        if found.shape != plain.shape or not torch.allclose(plain / found, frequencies, rtol=1e-4, atol=0.0):
            raise self._error(f"its {ROPE_FACTORS} is not that of Llama 3, the only known one")

    def _field(self, name: str, default: Any = None) -> Any:
        value = self.fields.get(f"{self.architecture}.{name}", default)
        if value is None:
            raise self._error(f"has no field {self.architecture}.{name}")
        return _shortest(value) if isinstance(value, float) else value

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {reason}")


def _read_header(path: Path) -> tuple[Any, dict[str, Any], dict[str, GGUFTensor]]:
    """The file's bytes, mapped; its fields, long lists as their lengths; its tensors by their names in the file."""
    from gguf import GGMLQuantizationType
    from transformers.integrations.gguf import reader  # its public functions know fewer types than files have

    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: is a file, and not a GGUF file; a backbone is that or a directory")
        data = np.asarray(reader._mapped(str(path)))
        fields, count, position = reader._read_metadata(data, str(path))
        entries, position = reader._read_tensor_table(data, count, position)
        alignment = fields.get("general.alignment", 32)
        begin = -(-position // alignment) * alignment
        tensors = {
            name: GGUFTensor(name, shape, GGMLQuantizationType(kind), begin + offset)
            for name, shape, kind, offset in entries
        }
        ends = {name: t.start + prod(t.shape[:-1]) * t.bytes_per_row for name, t in tensors.items()}
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file leads anywhere
        raise CheckpointError(f"{path}: truncated or damaged: {error}") from error
    last = max(ends, key=lambda name: ends[name], default=None)
    if last is not None and ends[last] > len(data):
        raise CheckpointError(f"{path}: truncated: tensor {last} ends at byte {ends[last]}, the file at {len(data)}")
    return data, fields, tensors


def _hub_name(name: str) -> str:
    """A tensor's name on the hub; an unknown one stays as it is."""
    module, _, own = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{own}"
    block, _, module = module.removeprefix("blk.").partition(".")
    return f"model.layers.{block}.{LAYER_NAMES[module]}.{own}" if module in LAYER_NAMES else name


def _shortest(number: float) -> float:
    """The decimal that was rounded to float32: 1e-6, not 9.999999974752427e-07."""
    return float(str(np.float32(number)))


def read_tokenizer(path: Path) -> Any:
    """The tokenizer and chat template in a file, as a fast tokenizer that splits texts like the hub's."""
    from transformers.integrations.gguf import get_gguf_tokenizer

    GGUFFile(path)  # an architecture that is refused comes first
    try:
        _, content, names = get_gguf_tokenizer(str(path))
        kind = content["tokenizer_type"]
        if kind not in KINDS:
            raise CheckpointError(f"{path}: its tokenizer is of the kind {kind}; supported: {', '.join(KINDS)}")
        return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](path, content), **names)
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: has no usable tokenizer: {error!r}") from error


def _byte_level(path: Path, content: dict[str, Any]) -> Tokenizer:
    """Pairs of bytes, merged; the file names how texts are split into words before."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

    way, tokens = content.get("pre_tokenizer_type"), content["tokens"]
    if way in SPLITS:
        split: list[Any] = [pre_tokenizers.Split(Regex(SPLITS[way]), behavior="isolated")]
    elif way == "smollm":
        split = [pre_tokenizers.Digits(individual_digits=True)]
    else:
        raise CheckpointError(
            f"{path}: its tokenizer splits texts in the way {way}, which is not known; "
            f"known: {', '.join(sorted({*SPLITS, 'smollm'}))}"
        )
    kinds = content.get("token_type") or [1] * len(tokens)
    while kinds and kinds[-1] == UNUSED:  # fillers up to the embedding's size
        kinds = kinds[:-1]
    vocabulary = {token: index for index, token in enumerate(tokens[: len(kinds)])}
    merges = [tuple(merge.split(" ")) for merge in content["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=way in WHOLE_WORDS))
    if way == "qwen2":
        backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=way == "smollm")
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, words])
    backend.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in added])
    return backend


def _sentencepiece(path: Path, content: dict[str, Any]) -> Tokenizer:
    """Pieces of whole texts, blanks included, merged by their scores; Llama 2's kind."""
    from transformers.integrations.gguf import convert_gguf_tokenizer

    backend: Tokenizer = convert_gguf_tokenizer("llama", content)[0]
    blank = "\u2581"
    prefix = [normalizers.Prepend(blank)] if content.get("add_prefix_space", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", blank)])
    backend.pre_tokenizer = None  # transformers' own puts no blank before a text that begins with one
    return backend


KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
