"""Loading for decoding: which type is chosen, what is refused, and that nothing stays behind in a file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model
from trm import TRMForCausalLM, linear, loading
from trm.device import has_fast_bfloat16
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.engine.runner import Runner
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
    with pytest.raises(ConfigError, match="int8: only on cpu so far; leave it out on cuda"):
        load_for_decoding(None, quantize="int8")
    monkeypatch.setattr(loading, "use_device", lambda *args: "cpu")
    with pytest.raises(ConfigError, match="fp8: only on cuda so far; leave it out on cpu"):
        load_for_decoding(None, quantize="fp8")


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


@pytest.mark.skipif(not has_fast_bfloat16("cpu"), reason="this processor has no bfloat16 products")
@pytest.mark.parametrize("own_lm_head", [False, True])
def test_a_packed_model_is_not_saved_over_a_whole_one(own_lm_head, tmp_path):
    make_model(own_lm_head=own_lm_head).save_pretrained(tmp_path / "model")
    files = [tmp_path / "model" / part / "model.safetensors" for part in (".", "backbone")]
    before = [file.read_bytes() for file in files]
    model = load_for_decoding(tmp_path / "model", dtype="bfloat16")

    for use in (
        lambda: model.save_pretrained(tmp_path / "model"),
        model.trained_state,
        model.backbone.to_transformers,
        lambda: list(model.backbone.hub_tensors()),
    ):
        with pytest.raises(ConfigError, match="packed for decoding; load the model again"):
            use()
    assert [file.read_bytes() for file in files] == before


def test_unknown_ways_are_refused_by_name():
    for how in ({"dtype": "float16"}, {"quantize": "int4"}):
        with pytest.raises(ConfigError, match="there are auto, float32, bfloat16, and int8, fp8"):
            load_for_decoding(None, **how)
    with pytest.raises(ConfigError, match="needs a model in bfloat16 on cpu"):
        prepare_for_decoding(make_model(), "int8")


def test_a_backbone_in_bfloat16_under_a_decoder_in_float32_decodes(chat):
    """As training holds them."""
    model = make_model()
    model.backbone.to(torch.bfloat16)
    request = Request((5, 6, 7), SamplingParams(max_tokens=5, ignore_eos=True))

    [before] = Engine(model, chat, EngineConfig(max_rows=2, max_model_len=32)).generate([request])
    [after] = Engine(prepare_for_decoding(model), chat, EngineConfig(max_rows=2, max_model_len=32)).generate([request])

    assert len(before.token_ids) == len(after.token_ids) == 5
    assert not model.exact


def test_loading_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()

    for check in (linear.has_packed_bfloat16, linear.has_int8):
        check.__wrapped__()

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not has_fast_bfloat16("cpu"), reason="this processor has no bfloat16 products")
@pytest.mark.parametrize(("length", "vocabulary"), [(2, 400), (3, 400), (65, 400), (64, 5)])
def test_exact_engines_of_any_size_start_and_count_their_cache(length, vocabulary, chat):
    model = prepare_for_decoding(make_model(sizes={"vocab_size": vocabulary}).to(torch.bfloat16))
    engine = Engine(model, chat, EngineConfig(max_rows=3, max_model_len=length))

    runner = engine.loop.runner
    tables = (runner.backbone_slots.keys, runner.backbone_slots.values, runner.slots.keys, runner.slots.values)
    assert engine.exact
    assert engine.stats().kv_cache_bytes == sum(table.nbytes for table in tables)
    [reply] = engine.generate([Request((3,), SamplingParams(max_tokens=length - 1, ignore_eos=True))])
    assert len(reply.token_ids) == length - 1


@pytest.mark.skipif(not has_fast_bfloat16("cpu"), reason="this processor has no bfloat16 products")
def test_a_cache_of_few_bytes_is_kept_within_them(chat):
    model = prepare_for_decoding(make_model().to(torch.bfloat16))
    per_token = Runner.bytes_per_position(model, model.config.n_layers)

    engine = Engine(model, chat, EngineConfig(max_rows=2, kv_cache_bytes=2 * 100 * per_token))
    assert engine.max_model_len == 64
    with pytest.raises(ConfigError, match="holds 64 positions for each of 2 rows"):
        Engine(model, chat, EngineConfig(max_rows=2, max_model_len=65, kv_cache_bytes=2 * 100 * per_token))
