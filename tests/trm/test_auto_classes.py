"""Through transformers' Auto classes: what they load, obey and refuse."""

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from tests.conftest import BACKBONES
from tests.trm.conftest import (
    generate,
    pad_left,
    some_prompt,
)
from trm import TRMConfig, TRMForCausalLM
from trm.errors import ConfigError, TRMError

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*"),
]


# Through the Auto classes


@pytest.mark.parametrize("family", BACKBONES)
def test_auto_classes_load_a_checkpoint(family, make_checkpoint, kv_source):
    directory, model = make_checkpoint(family=family, kv_source=kv_source)
    ids, mask = pad_left([some_prompt(9), some_prompt(2)])

    config = AutoConfig.from_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory)

    assert isinstance(config, TRMConfig)
    assert config.backbone_config.model_type == family
    assert isinstance(loaded, TRMForCausalLM)
    assert not loaded.training
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert generate(loaded, ids, mask) == generate(model, ids, mask)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.float64, "float64"], ids=["dtype", "name"])
@pytest.mark.parametrize("loader", [TRMForCausalLM, AutoModelForCausalLM], ids=["ours", "auto"])
def test_dtype_is_obeyed_or_refused_but_never_ignored(loader, argument, value, make_checkpoint):
    directory, _ = make_checkpoint()

    with contextlib.suppress(TRMError):
        model = loader.from_pretrained(directory, **{argument: value})
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "arguments",
    [{"use_safetensors": True, "low_cpu_mem_usage": True}, {"quantization_config": None, "output_loading_info": False}],
    ids=["habits", "nothing"],
)
def test_arguments_that_ask_for_nothing_are_taken(arguments, make_checkpoint):
    directory, model = make_checkpoint()

    loaded = AutoModelForCausalLM.from_pretrained(directory, **arguments)

    assert torch.equal(loaded.decoder.halt_head.weight, model.decoder.halt_head.weight)


def test_transformers_pipeline_writes_what_generate_does(make_checkpoint, tokenizer):
    directory, model = make_checkpoint()
    prompt = "3 and 4?"
    ids = torch.tensor([tokenizer.encode(prompt)])

    [reply] = pipeline("text-generation", str(directory))(
        prompt, max_new_tokens=12, do_sample=False, return_full_text=False
    )

    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert reply["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_auto_dtype_is_float32(make_checkpoint):
    directory, _ = make_checkpoint()

    for dtype in ("auto", None):
        assert TRMForCausalLM.from_pretrained(directory, dtype=dtype).dtype == torch.float32


# What is refused


def test_arguments_that_loading_does_not_know_are_refused_by_name(make_checkpoint):
    directory, _ = make_checkpoint()

    with pytest.raises(ConfigError, match="load_in_8bit"):
        TRMForCausalLM.from_pretrained(directory, load_in_8bit=True)


@pytest.mark.parametrize("loader", [TRMForCausalLM, AutoModelForCausalLM], ids=["ours", "auto"])
def test_a_configuration_other_than_the_checkpoints_is_refused_by_name(loader, make_checkpoint):
    directory, model = make_checkpoint()
    config = AutoConfig.from_pretrained(directory)
    assert loader.from_pretrained(directory, config=config).config.n_supervision == model.config.n_supervision

    config.n_supervision += 1

    with pytest.raises(ConfigError, match=f"n_supervision is {config.n_supervision}"):
        loader.from_pretrained(directory, config=config)


def test_settings_beside_the_checkpoints_are_refused_by_name(make_checkpoint):
    directory, model = make_checkpoint()

    with pytest.raises(ConfigError, match=f"n_supervision is {model.config.n_supervision + 1}"):
        AutoModelForCausalLM.from_pretrained(directory, n_supervision=model.config.n_supervision + 1)


@pytest.mark.parametrize("spread", ["auto", "balanced", "balanced_low_0", "sequential", {"": "cpu"}], ids=str)
def test_device_maps_of_transformers_mean_one_device(spread, make_checkpoint):
    directory, _ = make_checkpoint()

    loaded = AutoModelForCausalLM.from_pretrained(directory, device_map=spread)

    assert loaded.device.type == ("cuda" if torch.cuda.is_available() and spread != {"": "cpu"} else "cpu")
