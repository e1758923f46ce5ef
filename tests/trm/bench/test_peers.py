"""Every way decodes the same tokens, in a process of its own; a peer that cannot run is left out and says why."""

import json
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trm.bench import peers, ways
from trm.bench.models import checkpoint_of
from trm.bench.peers import BFLOAT16, LLAMA_CPP
from trm.bench.settings import PeersSettings
from trm.bench.ways import Job, Run, Way
from trm.checkpoint import read_backbone
from trm.errors import BadRequest, ConfigError

pytestmark = pytest.mark.slow

REQUESTS = 3
JOBS = [Job([1 + (7 * i + i * i * n) % 300 for i in range(5 + 3 * n)], 4 + 5 * n) for n in range(REQUESTS)]


@pytest.fixture(scope="module")
def result(backbone_directory: Path) -> dict[str, Any]:
    """Only transformers beside ours: there is no GGUF file."""
    settings = PeersSettings(
        model=str(backbone_directory),
        dtype="float32",
        effort=0,
        num_requests=REQUESTS,
        max_tokens=16,
        repeats=2,
        num_threads=1,
    )
    found: dict[str, Any] = json.loads(json.dumps(peers.measure(settings)))
    return found


def test_all_ways_decode_what_transformers_does(result):
    for raw, count in ((result["raw"]["one"], 1), (result["raw"]["many"], REQUESTS)):
        assert list(raw["ways"]) == ["effort 0", BFLOAT16]
        assert raw["requests"] == count
        assert raw["ways"]["effort 0"]["equal_to_float32"] == count
        assert raw["ways"][BFLOAT16]["equal_to_bfloat16"] == count
    assert result["raw"]["one"]["tokens"] == 16


def test_an_untrained_decoder_at_any_effort_says_what_the_backbone_does(backbone_directory):
    theirs = ways.transformers(str(backbone_directory), "float32", 1)(JOBS)
    with checkpoint_of(str(backbone_directory)) as directory:
        ours = ways.ours(str(directory), 4, num_threads=1, device="cpu", dtype="float32")(JOBS)

    assert ours.ids == theirs.ids
    assert [len(times) for times in ours.times] == [len(times) for times in theirs.times]
    with (
        pytest.raises(BadRequest, match="supervision_steps is 99"),
        checkpoint_of(str(backbone_directory)) as directory,
    ):
        ways.ours(str(directory), 99, num_threads=1, device="cpu")(JOBS)


def test_ratios_and_rates_follow_from_the_times(result):
    for size, raw in result["raw"].items():
        for way in raw["ways"].values():
            assert way["tokens_per_s"] == pytest.approx([raw["tokens"] / seconds for seconds in way["seconds"]])
        ours, theirs = (raw["ways"][name]["tokens_per_s"] for name in ("effort 0", BFLOAT16))
        assert result["ratios"][size]["effort 0"][BFLOAT16]["tokens_per_s"] == pytest.approx(sum(ours) / sum(theirs))


def test_memory_is_that_of_each_process(result):
    for way in result["raw"]["many"]["ways"].values():
        assert 10**8 < way["memory_bytes"]["resident"] <= way["memory_bytes"]["peak"] < 10**10


def test_the_table_has_every_way_and_what_is_missing(result):
    text = peers.table({**result, "threads": 1, "torch": "2"})

    assert text.count(f"\n| {BFLOAT16} |") == 2
    assert f"| {REQUESTS}, {result['raw']['many']['ways']['effort 0']['equal_to_bfloat16']} of {REQUESTS} |" in text
    assert "Left out: llama.cpp: needs the same backbone as a GGUF file: --gguf FILE" in text
    assert "the decoder is untrained" in text


def test_llama_cpp_that_is_not_installed_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    (tmp_path / "model.gguf").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "trm", "backbone_source": "somewhere"}))
    loaders, left_out = peers._loaders(tmp_path, [0], PeersSettings(gguf=tmp_path / "model.gguf"))

    assert LLAMA_CPP not in loaders
    assert "llama-cpp-python, which is not installed" in left_out[LLAMA_CPP]


def test_a_gguf_file_that_is_missing_is_a_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"--gguf .*none\.gguf: no such file"):
        peers.measure(PeersSettings(gguf=tmp_path / "none.gguf"))


def test_decoding_begins_when_every_prompt_is_read():
    """By hand: the second prompt is read after 2 s, and 3 tokens come in the 2 s behind it."""
    run = Run([[1, 2, 3], [4, 5, 6]], [[1.0, 1.5, 2.5], [2.0, 3.0, 4.0]])

    assert run.seconds == 4.0
    assert run.tokens_per_s == 6 / 4
    assert run.decoding_tokens_per_s == 3 / 2


def test_a_process_that_dies_says_so():
    way = Way("some engine", partial(os._exit, 3))  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="some engine: its process ended with status 3"):
        way.run(JOBS)
    way.close()


def test_a_way_that_fails_says_why():
    way = Way("some engine", partial(open, "/nowhere"))  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="some engine: FileNotFoundError"):
        way.run(JOBS)
    way.close()


def write_gguf(path: Path, source: Path) -> None:
    """A small Qwen2 in float32, without a tokenizer, as llama.cpp reads it."""
    backbone = read_backbone(source)
    config, state = backbone.config, dict(backbone.hub_tensors())
    fields: dict[str, Any] = {
        "general.architecture": "qwen2",
        "qwen2.block_count": config.num_hidden_layers,
        "qwen2.context_length": config.max_position_embeddings,
        "qwen2.embedding_length": config.hidden_size,
        "qwen2.feed_forward_length": config.intermediate_size,
        "qwen2.attention.head_count": config.num_attention_heads,
        "qwen2.attention.head_count_kv": config.num_key_value_heads,
        "qwen2.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "qwen2.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "qwen2.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "none",
    }
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {"self_attn.o_proj": "attn_output"}
    parts |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{theirs}": f"blk.{layer}.{part}" for theirs, part in parts.items()}

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def value(field: Any) -> bytes:
        if isinstance(field, str):
            return struct.pack("<I", 8) + text(field)
        return struct.pack("<If", 6, field) if isinstance(field, float) else struct.pack("<II", 4, field)

    head, data = b"GGUF" + struct.pack("<IQQ", 3, len(state), len(fields)), b""
    head += b"".join(text(name) + value(field) for name, field in fields.items())
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        head += text(f"{names[owner]}.{kind}") + struct.pack("<I", tensor.ndim)
        head += struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape)) + struct.pack("<IQ", 0, len(data))
        data += tensor.contiguous().numpy().tobytes()
        data += b"\0" * (-len(data) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)


def test_the_backbone_of_a_gguf_file_is_compared_with_too(backbone_directory, tmp_path):
    pytest.importorskip("gguf", reason="needs the extra gguf")
    write_gguf(tmp_path / "model.gguf", backbone_directory)

    ours = ways.transformers(str(tmp_path / "model.gguf"), "float32", 1)(JOBS)

    assert ours.ids == ways.transformers(str(backbone_directory), "float32", 1)(JOBS).ids


def test_llama_cpp_decodes_what_transformers_does(backbone_directory, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, the extra bench")
    write_gguf(tmp_path / "model.gguf", backbone_directory)
    ours = ways.llama_cpp(str(tmp_path / "model.gguf"), 1)(JOBS)
    theirs = ways.transformers(str(backbone_directory), "float32", 1)(JOBS)

    assert ours.ids == theirs.ids
    assert [len(times) for times in ours.times] == [job.max_tokens for job in JOBS]
    assert all(times == sorted(times) for times in ours.times)


def test_llama_cpp_refuses_what_is_no_gguf_file(tmp_path):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, the extra bench")
    (tmp_path / "model.gguf").write_text("hello")

    with pytest.raises(ConfigError, match="does not load it"):
        ways.llama_cpp(str(tmp_path / "model.gguf"), 1)
