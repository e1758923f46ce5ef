"""Layout for decoding: other strides, the same numbers."""

import pytest
import torch

from tests.conftest import make_model
from tests.trm.conftest import some_prompt
from trm.device import lay_out_by_columns, use_device
from trm.errors import ConfigError


def test_weights_keep_their_numbers_and_lie_by_columns():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    lay_out_by_columns(model)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.decoder.layers[0].attention.q_proj.weight.stride() == (1, model.config.hidden_size)
    assert model.backbone.embed_tokens.weight.is_contiguous()


def test_logits_stay_the_same():
    model = make_model().double()
    ids = torch.tensor([some_prompt(9)])
    before = model(ids).logits

    lay_out_by_columns(model)

    assert torch.allclose(model(ids).logits, before, rtol=0, atol=1e-12)


def test_tied_heads_stay_with_their_embedding():
    model = make_model(sizes={"tie_word_embeddings": True})

    lay_out_by_columns(model)

    assert model.backbone.lm_head.weight is model.backbone.embed_tokens.weight
    assert model.backbone.lm_head.weight.is_contiguous()


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_attention_on_a_gpu_plans_no_shape_anew(device, monkeypatch):
    was: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", was.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    assert use_device(device) == "cuda"

    assert was == [False]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert use_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="--device cpu"):
        use_device("cuda")
