"""Loading for decoding: which type is chosen, what is refused, and that nothing stays behind in a file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model
from trm import TRMForCausalLM, loading
from trm.device import has_fast_bfloat16
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.errors import ConfigError
from trm.layers import Linear
from trm.linear import has_int8
from trm.loading import best_dtype, load_for_decoding, prepare_for_decoding


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_every_allowed_way_of_loading_decodes(dtype, quantize, chat):
    if quantize is not None and (dtype == "float32" or not has_int8()):
        pytest.skip("refused, see below")
    model = load_for_decoding(None, dtype=dtype, quantize=quantize)
    request = Request(tuple(chat.encode([{"role": "user", "content": "1+1"}])), SamplingParams(max_tokens=4))

    [reply] = Engine(model, chat, EngineConfig(max_rows=2, max_model_len=64)).generate([request])

    assert reply.token_ids
    expected = torch.float32 if quantize is None and dtype in ("auto", "float32") else torch.bfloat16
    assert model.backbone.dtype == model.decoder.dtype == expected


def test_auto_is_bfloat16_for_large_models_where_the_processor_has_it(monkeypatch):
    config = make_model().config.backbone_config
    assert best_dtype(config, "cuda") == "bfloat16"
    for has_it in (True, False):
        monkeypatch.setattr(loading, "has_fast_bfloat16", lambda device, has_it=has_it: has_it)
        assert best_dtype(config, "cpu") == "float32", "small"
        monkeypatch.setattr(loading, "LARGE", 1000)
        assert best_dtype(config, "cpu") == ("bfloat16" if has_it else "float32")
        monkeypatch.undo()


def test_what_cannot_be_served_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(TRMForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("read"))

    with pytest.raises(ConfigError, match="leave --dtype float32 out"):
        load_for_decoding(None, dtype="float32", quantize="int8")
    monkeypatch.setattr(loading, "use_device", lambda *args: "cuda")
    with pytest.raises(ConfigError, match="only on a CPU so far; leave it out on cuda"):
        load_for_decoding(None, quantize="int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_that_decodes_is_a_window_into_a_file(dtype, tmp_path, chat):
    """Whoever overwrites a file in place must not change, or end, a process that serves from it."""
    make_model().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "backbone" / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    model = prepare_for_decoding(TRMForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype))
    request = Request((5, 6, 7), SamplingParams(max_tokens=5, logprobs=3, ignore_eos=True))
    engine = Engine(model, chat, EngineConfig(max_rows=1, max_model_len=32))
    [before] = engine.generate([request])

    with file.open("r+b") as content:
        content.write(bytes(file.stat().st_size))

    [after] = engine.generate([request])
    assert after.token_ids == before.token_ids
    assert [one.logprob for one in after.logprobs] == pytest.approx([one.logprob for one in before.logprobs], abs=1e-4)


@pytest.mark.skipif(not has_fast_bfloat16("cpu"), reason="this processor has no bfloat16 products")
def test_a_bfloat16_model_is_packed_and_a_float32_model_is_not():
    short, wide = make_model().to(torch.bfloat16), make_model()

    assert prepare_for_decoding(short).exact
    assert not prepare_for_decoding(wide).exact
    assert not any(isinstance(module, Linear) for module in short.modules())
    assert any(isinstance(module, Linear) for module in wide.modules())
