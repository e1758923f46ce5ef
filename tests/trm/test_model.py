"""The model: identity at birth, the equations, effort, and what `forward` takes and refuses.

Promises P1 and P5 of the design.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conftest import BACKBONES, make_backbone, make_model, randomize
from tests.trm.conftest import (
    generate,
    pad_left,
    pad_right,
    some_prompt,
    vary_norms,
    widen_norms,
)
from trm import TRMForCausalLM
from trm.cache import Sequences
from trm.errors import BadRequest

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*"),
]


# P1: an untrained decoder is the backbone


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", BACKBONES)
def test_untrained_decoder_gives_the_backbones_logits(family, tied, kv_source):
    backbone = vary_norms(make_backbone(family, tie_word_embeddings=tied))
    ids = torch.tensor([some_prompt(40), some_prompt(40, seed=1)])
    expected = backbone(ids).logits  # before the model exists, which might overwrite the backbone's weights

    model = TRMForCausalLM.from_backbone(backbone, n_latent=2, n_cycles=2, n_supervision=4, kv_source=kv_source).eval()

    for effort in (0, 1, 4):
        got = model(ids, n_supervision=effort).logits
        assert (got - expected).abs().max() / expected.abs().max() < 1e-4, f"effort {effort}"


@pytest.mark.parametrize("family", BACKBONES)
def test_effort_zero_is_the_backbone_whatever_the_decoder_learned(family, kv_source):
    backbone = vary_norms(make_backbone(family))
    ids = torch.tensor([some_prompt(40)])
    expected = backbone(ids).logits

    model = randomize(TRMForCausalLM.from_backbone(backbone, n_supervision=2, kv_source=kv_source).eval(), scale=1.0)

    assert (model(ids, n_supervision=0).logits - expected).abs().max() / expected.abs().max() < 1e-4
    assert (model(ids, n_supervision=1).logits - expected).abs().max() > 0.1, "the decoder must matter here"


def test_zero_initialisation_survives_construction():
    """transformers' `post_init` initialises every Linear again; the predecessor lost its zeros to that."""
    for model in (make_model(scale=None), AutoModelForCausalLM.from_config(make_model().config)):
        for layer in model.decoder.layers:
            assert not layer.attention.o_proj.weight.any()
            assert not layer.feed_forward.down_proj.weight.any()
            assert layer.attention.q_proj.weight.std() > 0.1
        assert not model.decoder.halt_head.weight.any()
        assert model.decoder.halt_head.bias.item() == -5


def test_backbone_weights_survive_construction():
    backbone = make_backbone()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}

    model = TRMForCausalLM.from_backbone(backbone)

    assert {name for name, _ in model.backbone.hub_tensors()} == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.hub_tensors())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())


def test_zero_initialisation_and_buffers_survive_loading(make_checkpoint):
    """`from_pretrained` builds on the meta device: buffers computed in `__init__` come back as garbage."""
    directory, model = make_checkpoint(scale=None)
    ids = torch.tensor([some_prompt(30)])

    loaded = TRMForCausalLM.from_pretrained(directory)

    assert not loaded.decoder.layers[0].attention.o_proj.weight.any()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_bfloat16_leaves_the_rotary_frequencies_alone(make_checkpoint):
    """`.to(bfloat16)` rounds them by up to 0.4 %, which turns distant positions by whole radians."""
    directory, model = make_checkpoint()

    loaded = TRMForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)

    assert loaded.decoder.halt_head.weight.dtype == torch.bfloat16
    assert loaded.backbone.embed_tokens.weight.dtype == torch.bfloat16
    far = torch.arange(500)
    for short, wide in zip(loaded.backbone.rope(far), model.backbone.rope(far), strict=True):
        assert torch.equal(short, wide)


# The equations


def by_the_book(model: TRMForCausalLM, ids: Sequence[int], effort: int) -> tuple[Tensor, Tensor]:
    """Logits and halting logits as the design writes them down, with nothing of the model but its weights."""
    config, backbone = model.config, model.config.backbone_config
    length, heads, groups, size = len(ids), backbone.num_attention_heads, backbone.num_key_value_heads, config.head_dim
    captured = []
    theirs = widen_norms(model.backbone.to_transformers())
    theirs.model.norm.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    theirs(torch.tensor([ids]))
    frequencies = 1 / 10000.0 ** (torch.arange(0, size, 2, dtype=torch.float32) / size)  # to the bit
    angles = torch.arange(length)[:, None] * frequencies
    cos, sin = angles.cos().double(), angles.sin().double()

    def norm(h: Tensor) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(h: Tensor) -> Tensor:  # (S, heads, d)
        first, second = h[..., : size // 2], h[..., size // 2 :]
        c, s = cos[:, None], sin[:, None]
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    def attend(layer: Any, h: Tensor, source: Tensor) -> Tensor:
        weights = layer.attention
        q = turn((h @ weights.q_proj.weight.T).view(length, heads, size))
        k = turn((source @ weights.k_proj.weight.T).view(length, groups, size))
        v = (source @ weights.v_proj.weight.T).view(length, groups, size)
        out = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = q[:, head] @ k[:, group].T / size**0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            out.append(scores.softmax(-1) @ v[:, group])
        return torch.cat(out, -1) @ weights.o_proj.weight.T

    def f(h: Tensor) -> Tensor:
        for layer in model.decoder.layers:
            h = norm(h + attend(layer, h, x if config.kv_source == "context" else h))
            swiglu = layer.feed_forward
            gate = h @ swiglu.gate_proj.weight.T
            h = norm(h + (gate * gate.sigmoid() * (h @ swiglu.up_proj.weight.T)) @ swiglu.down_proj.weight.T)
        return h

    x = norm(captured[0][0])
    y = z = torch.zeros_like(x)
    for _ in range(effort):
        for _ in range(config.n_cycles):
            for _ in range(config.n_latent):
                z = f(x + y + z)
            y = f(y + z)
    y = x if effort == 0 else y
    head = model.lm_head if model.lm_head is not None else model.backbone.lm_head
    halt = model.decoder.halt_head
    return (model.backbone.norm.weight * norm(y)) @ head.weight.T, y @ halt.weight[0] + halt.bias


@pytest.mark.parametrize("effort", [0, 1, 3])
@pytest.mark.parametrize("n_layers", [1, 2], ids=["L1", "L2"])
@pytest.mark.parametrize("family", BACKBONES)
def test_forward_follows_the_equations(family, n_layers, effort, kv_source):
    """Every other test compares the model with itself. Here x stays out of the answer's update, and g is in."""
    backbone = vary_norms(make_backbone(family))
    model = TRMForCausalLM.from_backbone(backbone, n_latent=3, n_cycles=2, n_layers=n_layers, kv_source=kv_source)
    model = randomize(model.eval().double(), scale=1.0)
    prompt = some_prompt(9)

    out = model(torch.tensor([prompt]), n_supervision=effort)

    logits, halt_logits = by_the_book(model, prompt, effort)
    assert (out.logits[0] - logits).abs().max() < 1e-9
    assert (out.halt_logits[0] - halt_logits).abs().max() < 1e-9


# P5: effort


@pytest.mark.parametrize("effort", [1, 2, 3, 6])
def test_effort_n_is_step_n_of_all_steps(effort, kv_source):
    model = make_model(kv_source=kv_source, scale=1.0).double()
    ids, mask = pad_left([some_prompt(14), some_prompt(4)])

    every = model(ids, attention_mask=mask, n_supervision=6, return_all_steps=True)
    one = model(ids, attention_mask=mask, n_supervision=effort)

    assert every.all_logits.shape == (6, 2, 14, 400)
    assert every.all_halt_logits.shape == (6, 2, 14)
    assert torch.equal(every.logits, every.all_logits[-1])
    assert (one.logits - every.all_logits[effort - 1]).abs().max() < 1e-9
    assert (one.halt_logits - every.all_halt_logits[effort - 1]).abs().max() < 1e-9
    assert (every.all_logits[0] - every.all_logits[1]).abs().max() > 0.01, "steps must differ here"


def test_default_effort_is_the_trained_one(kv_source):
    model = make_model(kv_source=kv_source)
    ids = torch.tensor([some_prompt(5)])

    assert torch.equal(model(ids).logits, model(ids, n_supervision=3).logits)


@pytest.mark.parametrize("effort", [1, 4])
def test_generate_at_effort_n_follows_step_n(effort, kv_source):
    model = make_model(kv_source=kv_source, scale=1.0).double()
    prompt = some_prompt(7)

    reply = generate(model, torch.tensor([prompt]), None, n_supervision=effort)[0]

    whole = torch.tensor([[*prompt, *reply]])
    steps = model(whole, n_supervision=4, return_all_steps=True).all_logits
    assert steps[effort - 1, 0, 6:-1].argmax(-1).tolist() == reply
    assert not torch.equal(steps[0].argmax(-1), steps[2].argmax(-1)), "effort must matter here"


@pytest.mark.parametrize("effort", [-1, 17])
def test_effort_beyond_the_maximum_is_refused_with_the_limit(effort):
    model = make_model()

    for call in (model, lambda ids, **options: model.generate(ids, max_new_tokens=1, **options)):
        with pytest.raises(BadRequest, match=f"{effort}.*0 to 16") as caught:
            call(torch.tensor([[5, 6]]), n_supervision=effort)
        assert caught.value.param == "supervision_steps"


# Arguments of forward


@pytest.mark.parametrize("kept", [0, 1, 3, 8, 9, 100, torch.tensor([6, 2])], ids=str)
def test_logits_to_keep_selects_positions(kept, kv_source):
    """As in transformers, where a number beyond the length keeps everything."""
    model = make_model(kv_source=kv_source, scale=1.0).double()
    ids = torch.tensor([some_prompt(8)])
    every = model(ids, return_all_steps=True)

    some = model(ids, logits_to_keep=kept, return_all_steps=True)

    chosen = kept if isinstance(kept, Tensor) else slice(-kept, None) if kept else slice(None)
    assert some.logits.shape == every.logits[:, chosen].shape
    assert (some.logits - every.logits[:, chosen]).abs().max() < 1e-9
    assert (some.all_logits - every.all_logits[:, :, chosen]).abs().max() < 1e-9


def test_labels_give_the_mean_cross_entropy_of_the_next_tokens(kv_source):
    model = make_model(kv_source=kv_source)
    ids, mask = pad_right([some_prompt(9), some_prompt(4)])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100

    out = model(ids, attention_mask=mask, labels=labels)

    logprobs = out.logits.log_softmax(-1)
    losses = [
        -logprobs[row, position - 1, ids[row, position]]
        for row, length in ((0, 9), (1, 4))
        for position in range(2, length)
    ]
    assert out.loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_labels_with_kept_logits_are_computed_or_refused(kv_source):
    """The docstring lets the recursion shrink to the kept positions only where there are no labels."""
    model = make_model(kv_source=kv_source)
    ids = torch.tensor([some_prompt(9)])

    with contextlib.suppress(BadRequest):
        kept = model(ids, labels=ids, logits_to_keep=2)
        assert kept.loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-6)


def test_gradient_of_the_last_cycles_stops_before_them(kv_source):
    """`grad_cycles=1` is the paper's gradient: the same numbers, as if the cycles before were constants."""
    two = make_model(kv_source=kv_source, n_cycles=2)
    one = make_model(kv_source=kv_source, n_cycles=1)
    one.decoder.load_state_dict(two.decoder.state_dict())
    mask, rope = torch.ones(1, 1, 6, 6).tril().bool(), two.backbone.rope(torch.arange(6)[None])
    states = two.encode(two.backbone.embed_tokens(torch.tensor([some_prompt(6)])), rope, Sequences(mask))
    x = states[..., -1, :]

    def key_values(model: TRMForCausalLM) -> Sequences:
        seen = Sequences(mask, keep=kv_source == "context")
        if kv_source == "context":
            model.decoder.write_context(states, rope, seen)
        return seen

    def gradients(model: TRMForCausalLM, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y.square().sum() + y[0, 0, 0], list(model.decoder.layers.parameters())))

    zero = torch.zeros_like(x)
    with torch.enable_grad():
        y, z = two.decoder.step(x, zero, zero, rope, key_values(two), grad_cycles=1)
        with torch.no_grad():
            constants = one.decoder.step(x, zero, zero, rope, key_values(one))
        expected_y, expected_z = one.decoder.step(x, *constants, rope, key_values(one))

        assert torch.allclose(y, expected_y, atol=1e-5)
        assert torch.allclose(z, expected_z, atol=1e-5)
        for got, expected in zip(gradients(two, y), gradients(one, expected_y), strict=True):
            assert expected.any()
            assert torch.allclose(got, expected, atol=1e-4)


def test_embeddings_stand_for_ids():
    model = make_model()
    ids = torch.tensor([some_prompt(9)])

    got = model(inputs_embeds=model.get_input_embeddings()(ids))

    assert torch.equal(got.logits, model(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 4)}, r"\(2, 4\).*\(2, 3\)"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 1, 3, 3)}, "attention_mask"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "return_dict": False}, "return_dict"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "output_hidden_states": True}, "output_hidden_states"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "output_attentions": True}, "output_attentions"),
    ],
    ids=["nothing", "mask-too-long", "mask-of-four-dimensions", "tuple", "hidden-states", "attentions"],
)
def test_forward_refuses_what_it_cannot_read(arguments, message):
    with pytest.raises(BadRequest, match=message):
        make_model()(**arguments)


def test_the_head_is_the_output_embeddings():
    model = make_model()

    assert model.get_output_embeddings() is model.backbone.lm_head


@pytest.mark.parametrize("value", [None, False])
def test_outputs_that_nobody_asks_for_are_left_out(value):
    """What wrappers of models, such as PEFT's, pass on whether or not their caller gave it."""
    model = make_model()
    ids = torch.tensor([some_prompt(9)])

    got = model(ids, output_attentions=value, output_hidden_states=value, return_dict=None)

    assert torch.equal(got.logits, model(ids).logits)


def test_a_cache_that_does_not_grow_is_refused():
    model = make_model()

    with pytest.raises(BadRequest, match=r"StaticCache.*DynamicCache"):
        model.generate(torch.tensor([some_prompt(4)]), max_new_tokens=2, cache_implementation="static")


def test_mask_shorter_than_the_past_is_refused(kv_source):
    """A mask of the new tokens alone would silently be read as the oldest ones."""
    model = make_model(kv_source=kv_source)
    cache = model(torch.tensor([some_prompt(4)]), use_cache=True).past_key_values

    with pytest.raises(BadRequest, match="past tokens included"):
        model(torch.tensor([[5]]), attention_mask=torch.ones(1, 1), past_key_values=cache)


# The head


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_own_head_starts_as_the_backbones_and_moves_alone(tied):
    backbone = vary_norms(make_backbone(tie_word_embeddings=tied))
    ids = torch.tensor([some_prompt(9)])
    shared = randomize(TRMForCausalLM.from_backbone(backbone, n_supervision=2).eval())
    own = randomize(TRMForCausalLM.from_backbone(backbone, n_supervision=2, own_lm_head=True).eval())
    embedding = own.backbone.embed_tokens.weight.clone()

    assert torch.equal(own(ids).logits, shared(ids).logits)
    assert own.lm_head.weight.requires_grad
    own.lm_head.weight.add_(1.0)

    assert not torch.allclose(own(ids).logits, shared(ids).logits)
    assert torch.equal(own.backbone.embed_tokens.weight, embedding)
    assert "lm_head.weight" in own.trained_state()
    assert "lm_head.weight" not in shared.trained_state()


# What the context is mixed from


def test_a_plain_context_is_the_last_state_and_has_no_weights():
    plain, empty = make_model(), make_model(context_layers=[])
    ids = torch.tensor([some_prompt(9)])

    assert torch.equal(plain(ids).logits, empty(ids).logits)
    assert "decoder.context_mix" not in plain.trained_state()
    assert plain.config.state_layers == empty.config.state_layers == [2]


def test_a_mixed_context_is_the_weighted_states_scaled_by_rms():
    """With the weight of the last state alone it is the plain context."""
    plain, mixed = make_model(), make_model(context_layers=[0, 1, 2])
    mixed.decoder.load_state_dict({**mixed.decoder.state_dict(), **plain.decoder.state_dict()})
    ids = torch.tensor([some_prompt(9)])
    different = mixed(ids).logits

    with torch.no_grad():
        mixed.decoder.context_mix.copy_(torch.tensor([[0.0], [0.0], [3.0]]).expand(3, 32))

    torch.testing.assert_close(mixed(ids).logits, plain(ids).logits)
    assert (different - plain(ids).logits).abs().max() > 0.01


def test_a_mixed_context_is_saved_and_loaded(tmp_path, tokenizer):
    model = make_model(context_layers=[0, 2])
    model.save_pretrained(tmp_path / "model", tokenizer)

    again = TRMForCausalLM.from_pretrained(tmp_path / "model")

    ids = torch.tensor([some_prompt(9)])
    assert again.config.context_layers == [0, 2]
    assert torch.equal(again(ids).logits, model(ids).logits)
