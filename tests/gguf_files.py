"""GGUF files of small models, written by llama.cpp's own package, which is imported only for that."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_gguf(
    path: Path,
    model: Any,
    kind: str = "F32",
    tokenizer: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> Path:
    """A model of transformers, as llama.cpp's own converter writes it; `kind` is that of the matrices.

    `tokenizer`, `fields` and `tensors` are written as well; a field that is None is left out.
    """
    import gguf

    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, family)
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    about = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if family != "qwen2":
        about |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if family == "llama":
        about |= {"rope.dimension_count": head_dim, "vocab_size": config.vocab_size}
    if rope["rope_type"] in ("linear", "yarn"):
        about |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        about["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    content = {f"{family}.{name}": value for name, value in about.items()}
    content |= {f"tokenizer.{name}": value for name, value in (tokenizer or {}).items()} | (fields or {})
    if gap := content.pop("general.alignment", None):
        writer.add_custom_alignment(gap)
    for name, value in content.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(name, value)
    theirs = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family), config.num_hidden_layers
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        numbers, module = tensor.float().numpy(), name.split(".")[-2]
        if family == "llama" and module in heads:
            halves = numbers.reshape(heads[module], 2, -1, *numbers.shape[1:])
            numbers = halves.swapaxes(1, 2).reshape(numbers.shape)
        as_type = gguf.GGMLQuantizationType[kind if numbers.ndim > 1 else "F32"]
        data = numbers.astype(np.int32) if as_type.name == "I32" else gguf.quantize(numbers, as_type)
        writer.add_tensor(theirs.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=as_type)
    for name, numbers in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(tokenizer: Any, way: str | None, fillers: int = 0) -> dict[str, Any]:
    """What a file says of a tokenizer of Qwen's or Llama 3's kind."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = dict(content["model"]["vocab"])
    kinds = dict.fromkeys(tokens, 1)
    for token in content["added_tokens"]:
        tokens[token["content"]] = token["id"]
        kinds[token["content"]] = 3 if token["special"] else 4
    ordered = sorted(tokens, key=lambda token: tokens[token])
    assert [tokens[token] for token in ordered] == list(range(len(tokens)))
    return {
        "ggml.model": "gpt2",
        "ggml.pre": way,
        "ggml.tokens": ordered + [f"[PAD{len(ordered) + i}]" for i in range(fillers)],
        "ggml.token_type": [kinds[token] for token in ordered] + [5] * fillers,
        "ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "ggml.eos_token_id": tokenizer.eos_token_id,
        "ggml.padding_token_id": tokenizer.pad_token_id,
        "ggml.bos_token_id": tokenizer.bos_token_id,
        "chat_template": tokenizer.chat_template,
    }
