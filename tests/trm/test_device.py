"""Layout for decoding: other strides, the same numbers."""

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model
from tests.trm.conftest import some_prompt
from trm import TRMForCausalLM
from trm.device import lay_out_for_decoding


def test_weights_keep_their_numbers_and_lie_by_columns():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    lay_out_for_decoding(model)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.decoder.layers[0].attention.q_proj.weight.stride() == (1, model.config.hidden_size)
    assert model.backbone.embed_tokens.weight.is_contiguous()


def test_logits_stay_the_same():
    model = make_model().double()
    ids = torch.tensor([some_prompt(9)])
    before = model(ids).logits

    lay_out_for_decoding(model)

    assert torch.allclose(model(ids).logits, before, rtol=0, atol=1e-12)


def test_tied_heads_stay_with_their_embedding():
    model = make_model(sizes={"tie_word_embeddings": True})

    lay_out_for_decoding(model)

    assert model.backbone.lm_head.weight is model.backbone.embed_tokens.weight
    assert model.backbone.lm_head.weight.is_contiguous()


def test_nothing_that_decodes_is_a_window_into_a_file(tmp_path):
    """Whoever overwrites a file in place must not change, or end, a process that serves from it."""
    make_model().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "backbone" / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    model = TRMForCausalLM.from_pretrained(tmp_path / "model")
    lay_out_for_decoding(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with file.open("r+b") as content:
        content.write(bytes(file.stat().st_size))

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
