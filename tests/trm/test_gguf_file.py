"""Backbones from GGUF files: the same model, to the bit, and the same ids as the directory that they were made from."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import make_backbone
from tests.gguf_files import byte_level, write_gguf
from tests.trm.test_backbone import ROPES, VARIETIES, make, make_variety
from trm import TRMForCausalLM, checkpoint, extra
from trm.checkpoint import BACKBONE_DIR, backbone_record, fingerprint
from trm.errors import CheckpointError, ConfigError

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TEXTS = (
    "Natalia sold 48/2 = 24 clips in May, and 1234567 in June.",
    "  leading\t\ttabs\n\n\n   and lines\r\n",
    "don't WE'LL re\u0301sume\u0301 na\u00efve \u00a0nbsp",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u00bd\u00b2",
    "<|im_start|>user\n\\boxed{72}<|im_end|>",
    "[PAD2050]",
)
BLANK = "\u2581"

pytestmark = pytest.mark.usefixtures("no_gradients")


def assert_same_ids(ours: Any, theirs: Any, texts: Sequence[str] = TEXTS) -> None:
    for text in texts:
        for split in (False, True):
            told = {"add_special_tokens": False, "split_special_tokens": split}
            ids = theirs(text, **told)["input_ids"]
            assert ours(text, **told)["input_ids"] == ids, (text, split)
            assert ours.decode(ids) == theirs.decode(ids), text


# The model


@pytest.mark.parametrize("variety", VARIETIES)
def test_a_file_in_float32_is_the_same_model_to_the_bit(variety: str, tmp_path: Path) -> None:
    theirs = make_variety(variety)
    theirs.save_pretrained(tmp_path)
    expected = checkpoint.read_backbone(tmp_path)

    ours = checkpoint.read_backbone(write_gguf(tmp_path / "model.gguf", theirs))

    assert fingerprint(ours) == fingerprint(expected)
    assert dict(ours.hub_tensors()).keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.hub_tensors())
    assert torch.equal(ours.rope_frequencies, expected.rope_frequencies)
    assert [layer.attention_norm.eps for layer in ours.layers] == [theirs.config.rms_norm_eps] * len(ours.layers)
    assert (ours.lm_head.weight is ours.embed_tokens.weight) == theirs.config.tie_word_embeddings
    same = ("head_dim", "attention_bias", "mlp_bias", "max_position_embeddings", "hidden_act", *checkpoint.STRUCTURE)
    for name in same:
        assert getattr(ours.config, name, None) == getattr(expected.config, name, None), name


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_1"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_shorter_numbers_are_what_the_library_makes_of_them(family: str, kind: str, tmp_path: Path) -> None:
    theirs = make(family)
    path = write_gguf(tmp_path / "model.gguf", theirs, kind)
    type_ = gguf.GGMLQuantizationType[kind]

    ours, rounded = checkpoint.read_backbone(path), checkpoint.read_backbone(path, None, torch.bfloat16)

    short = dict(rounded.hub_tensors())
    for name, tensor in ours.hub_tensors():
        expected = theirs.state_dict()[name]
        if expected.ndim > 1:  # whole rows are rounded, so it does not matter that Llama's come in another order
            expected = torch.from_numpy(gguf.dequantize(gguf.quantize(expected.numpy(), type_), type_))
            assert not torch.equal(expected, theirs.state_dict()[name])
        assert torch.equal(tensor, expected), name
        assert torch.equal(short[name], expected.to(torch.bfloat16)), name


def test_large_tensors_are_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trm.gguf_file.ROWS", 7)
    theirs = make("llama")

    ours = checkpoint.read_backbone(write_gguf(tmp_path / "model.gguf", theirs))

    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.hub_tensors())


def test_tensors_may_begin_at_multiples_of_another_number(tmp_path: Path) -> None:
    theirs = make("qwen3")

    ours = checkpoint.read_backbone(write_gguf(tmp_path / "model.gguf", theirs, fields={"general.alignment": 256}))

    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.hub_tensors())


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_scaled_positions_are_kept(family: str, rope: str, tmp_path: Path) -> None:
    parameters = {"rope_type": rope, "rope_theta": 5e5} | (LLAMA3 if rope == "llama3" else ROPES[rope])
    theirs = make(family, rope_parameters=parameters, max_position_embeddings=32768)
    theirs.save_pretrained(tmp_path)
    expected = checkpoint.read_backbone(tmp_path)
    plain = 1.0 / 5e5 ** (torch.arange(0, 2 * len(expected.rope_frequencies), 2).double() / 16)
    if family != "qwen3":
        plain = 1.0 / 5e5 ** (torch.arange(0, 8, 2).double() / 8)
    factors = {"rope_freqs.weight": (plain / expected.rope_frequencies).numpy()} if rope == "llama3" else {}

    ours = checkpoint.read_backbone(write_gguf(tmp_path / "model.gguf", theirs, tensors=factors))

    assert torch.equal(ours.rope_frequencies, expected.rope_frequencies)
    assert ours.rope_scale == expected.rope_scale
    assert not torch.allclose(ours.rope_frequencies, plain.float(), rtol=0.1), "the scaling must matter here"
    assert ours.config.rope_parameters == expected.config.rope_parameters


def test_a_checkpoint_names_the_file_and_its_fingerprint(tmp_path: Path, tokenizer: Any) -> None:
    """Small as it is: what it holds in four bits would be copied in 32."""
    path = write_gguf(tmp_path / "model.gguf", make("qwen2"), "Q8_0")
    backbone = checkpoint.read_backbone(path, None, torch.bfloat16)
    record = backbone_record(path, None, backbone)
    model = TRMForCausalLM.from_backbone(backbone, n_supervision=2, **record)
    model.save_pretrained(tmp_path / "checkpoint", tokenizer)
    ids = torch.tensor([[3, 5, 9, 11]])

    again = TRMForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)

    assert record["backbone_source"] == str(path)
    assert record["backbone_fingerprint"] == fingerprint(backbone)
    assert not (tmp_path / "checkpoint" / BACKBONE_DIR).exists()
    assert torch.equal(again.backbone.lm_head.weight, backbone.lm_head.weight.float())
    assert torch.equal(again(ids).logits, model.float()(ids).logits)
    write_gguf(path, make_backbone("qwen2", seed=1), "Q8_0")
    with pytest.raises(CheckpointError, match=r"model\.gguf: the backbone's weights have fingerprint .* trained on"):
        TRMForCausalLM.from_pretrained(tmp_path / "checkpoint")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.gguf: no such file"):
        TRMForCausalLM.from_pretrained(tmp_path / "checkpoint")


# The tokenizer


@pytest.mark.parametrize("name", ["tokenizer", "qwen2_tokenizer"])
def test_ids_are_those_of_qwens_own_tokenizer(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    theirs = request.getfixturevalue(name)
    path = write_gguf(tmp_path / "model.gguf", make("qwen2"), tokenizer=byte_level(theirs, "qwen2", fillers=5))

    ours = checkpoint.read_tokenizer(path)

    assert len(ours) == len(theirs)
    assert ours.chat_template == theirs.chat_template
    for special in ("eos_token", "pad_token", "bos_token", "unk_token"):
        assert getattr(ours, special) == getattr(theirs, special), special
    assert_same_ids(ours, theirs)
    ours.save_pretrained(tmp_path / "saved")
    assert_same_ids(checkpoint.read_tokenizer(tmp_path / "saved"), theirs)
    assert str(tmp_path) not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_what_lies_beside_the_file_is_not_read(tmp_path: Path, tokenizer: Any) -> None:
    path = write_gguf(tmp_path / "model.gguf", make("qwen2"), tokenizer=byte_level(tokenizer, "qwen2"))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")

    ours = checkpoint.read_tokenizer(path)

    assert ours.chat_template == tokenizer.chat_template
    assert_same_ids(ours, tokenizer)
    assert checkpoint.read_backbone_config(path).model_type == "qwen2"


def small_byte_level(split: Any, ignore_merges: bool, specials: Sequence[str]) -> Any:
    """A tokenizer of bytes, digits in pairs and threes, the word " clips", and `specials` of any spelling."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("12", "3"), ("\u0120", "c"), ("l", "i")]
    tokens = [*alphabet, *map("".join, merges), "\u0120clips"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=specials[0], pad_token=specials[-1])


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WAYS = {
    "llama-bpe": ([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), BYTES], True),
    "smollm": (
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        False,
    ),
    "deepseek-r1-qwen": (
        [pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated"), BYTES],
        False,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_ids_are_those_of_other_families_tokenizers(way: str, tmp_path: Path) -> None:
    """Llama 3 keeps a word that is a token; SmolLM2 splits digits; DeepSeek's specials are no ASCII."""
    specials = ("<|im_end|>", "<\uff5cUser\uff5c>", f"<\uff5cend{BLANK}of{BLANK}sentence\uff5c>")
    theirs = small_byte_level(*WAYS[way], specials)
    family = "qwen2" if "qwen" in way else "llama"

    ours = checkpoint.read_tokenizer(
        write_gguf(tmp_path / "model.gguf", make(family), tokenizer=byte_level(theirs, way))
    )

    assert len(ours) == len(theirs)
    assert_same_ids(ours, theirs, [*TEXTS, " clips 1231 clipsi 123\u00b2", "".join(specials) + "<think>1</think>"])
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert {t.content for t in ours.added_tokens_decoder.values() if t.special} == set(specials)


@pytest.mark.parametrize("prefix", [None, True, False], ids=str)
def test_ids_are_those_of_llama_2s_kind(prefix: bool | None, tmp_path: Path) -> None:
    pieces = [BLANK, "a", "b", "\u00e9", f"{BLANK}a", "ab", f"{BLANK}ab", f"{BLANK}{BLANK}"]  # the best ones first
    scores = [-20.0, -21.0, -22.0, -23.0, -1.0, 0.0, -2.0, -3.0]
    merges = [("a", "b"), (BLANK, "a"), (f"{BLANK}a", "b"), (BLANK, "ab"), (BLANK, BLANK)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    steps = (
        [normalizers.Replace(" ", BLANK)]
        if prefix is False
        else [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    content = {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.scores": [0.0] * 259 + scores,
        "ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.add_space_prefix": prefix,
    }

    ours = checkpoint.read_tokenizer(write_gguf(tmp_path / "model.gguf", make("llama"), tokenizer=content))

    assert_same_ids(ours, theirs, ["ab", " ab", "   a b", "a\u00e9\u20ac\n12", "ab ab  aab ba", ""])
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")


# What is refused


@pytest.mark.parametrize("way", ["gpt-2", "default", None])
def test_an_unknown_way_to_split_texts_is_named(way: str | None, tmp_path: Path, tokenizer: Any) -> None:
    path = write_gguf(tmp_path / "model.gguf", make("llama"), tokenizer=byte_level(tokenizer, way))

    with pytest.raises(CheckpointError, match=rf"model\.gguf: its tokenizer splits texts in the way {way}, .* known: "):
        checkpoint.read_tokenizer(path)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"ggml.model": "bert"}, "its tokenizer is of the kind bert; supported: gpt2, llama"),
        ({}, "no usable tokenizer"),
    ],
)
def test_a_tokenizer_that_is_missing_or_of_another_kind_is_named(
    tokenizer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tokens = {"ggml.tokens": ["a"], "ggml.token_type": [1]} if tokenizer else {}
    path = write_gguf(tmp_path / "model.gguf", make("qwen2"), tokenizer=tokenizer | tokens)

    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_tokenizer(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "gemma3"}, "its architecture is gemma3; supported: qwen2, qwen3, llama"),
        ({"split.count": 3}, "is one of 3 parts of a model; join them"),
        ({"llama.attention.sliding_window": 64}, r"its field llama\.attention\.sliding_window is not known"),
        ({"llama.rope.scale_linear": 2.0}, r"its field llama\.rope\.scale_linear is not known"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type is longrope; supported: none, linear, yarn"),
        ({"llama.rope.scaling.type": "linear"}, r"has no field llama\.rope\.scaling\.factor"),
        ({"llama.rope.dimension_count": 4}, r"its llama\.rope\.dimension_count is 4, and a head's size is 8"),
        ({"llama.attention.value_length": 4}, r"its llama\.attention\.value_length is 4, and a head's size is 8"),
        ({"llama.block_count": None}, r"has no field llama\.block_count"),
        ({"llama.embedding_length": 28}, r"tensors are missing or misshapen, lm_head\.weight first"),
        ({"llama.block_count": 3}, r"block_count is 3, and it has 2 layers"),
        ({"llama.block_count": 1}, r"block_count is 1, and it has 2 layers"),
        ({"llama.attention.head_count": "four"}, "has no usable configuration"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", make("llama"), fields=fields)

    with pytest.raises(CheckpointError, match=rf"model\.gguf: .*{message}"):
        checkpoint.read_backbone(path)


@pytest.mark.parametrize("factors", [[1.0, 1.0, 2.0, 8.0], [1.0] * 3], ids=str)
def test_frequencies_that_are_not_llama_3s_are_named(factors: list[float], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", make("llama"), tensors={"rope_freqs.weight": factors})

    with pytest.raises(CheckpointError, match=r"its rope_freqs\.weight is not that of Llama 3"):
        checkpoint.read_backbone(path)


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.weight", "output.bias", "blk.1.attn_sub_norm.weight"])
def test_a_tensor_that_is_not_used_is_named(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", make("qwen2"), tensors={name: np.ones(32)})

    with pytest.raises(CheckpointError, match=rf"model\.gguf: its tensor {name} has no place in a qwen2 model"):
        checkpoint.read_backbone(path)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", make("qwen2"), "I32")

    with pytest.raises(CheckpointError, match=r"model\.gguf: tensor token_embd\.weight is of type I32, .* not read"):
        checkpoint.read_backbone(path)


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    path = write_gguf(tmp_path / "model.gguf", make("qwen2"), "Q8_0", tokenizer=byte_level(tokenizer, "qwen2"))
    whole = path.read_bytes()
    for size in [0, 3, 4, 10, 24, *range(25, len(whole), len(whole) // 60), len(whole) - 1]:
        path.write_bytes(whole[:size])
        for read in (checkpoint.read_backbone, checkpoint.read_backbone_config, checkpoint.read_tokenizer):
            with pytest.raises(CheckpointError, match=rf"^{path}: (truncated|is a file, and not a GGUF file)"):
                read(path)  # type: ignore[operator]


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    theirs = make("llama")
    theirs.model.layers[1].self_attn.k_proj.weight[3, 5] = float("nan")

    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight holds numbers that are not"
    ):
        checkpoint.read_backbone(write_gguf(tmp_path / "model.gguf", theirs))


def test_a_missing_library_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    for read in (checkpoint.read_backbone, checkpoint.read_tokenizer):
        with pytest.raises(ConfigError, match=r"model\.gguf: .* needs gguf, .*pip install 'qwen-trm\[gguf\]'"):
            read(tmp_path / "model.gguf")


def test_a_file_is_no_model_to_serve(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    with pytest.raises(CheckpointError, match=r"model\.gguf: is a file; .*trm-train --backbone"):
        checkpoint.read(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["none.gguf", "models/none.gguf", "/nowhere/none.gguf"])
def test_a_file_that_is_not_there_is_no_id_of_the_hub(name: str) -> None:
    for read in (checkpoint.read_backbone, checkpoint.read_tokenizer):
        with pytest.raises(CheckpointError, match=f"^{name}: no such file$"):
            read(name)


def test_a_directory_is_read_without_the_library() -> None:
    code = """
import sys
from trm import bundled_model_path, checkpoint
checkpoint.read(bundled_model_path())
checkpoint.read_tokenizer(bundled_model_path())
print({"gguf", "transformers.integrations.gguf.gguf_tokenizer_mapping"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"
