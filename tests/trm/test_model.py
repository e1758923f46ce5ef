"""The model: identity at birth, batches equal to solo runs, exact cache, effort, and what is refused.

Promises P1, P2, P3 and P5 of the design, through `forward` and transformers' own `generate`.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
from transformers.cache_utils import DynamicCache

from tests.conftest import BACKBONES, make_backbone, make_model, randomize
from tests.trm.conftest import NEAR_TIE, assert_same_tokens, pad_left, pad_right, some_prompt, vary_norms, widen_norms
from trm import TRMConfig, TRMForCausalLM, reference
from trm.cache import Sequences
from trm.chat import ChatFormat, solve_messages
from trm.engine import SamplingParams
from trm.errors import BadRequest, ConfigError, TRMError

pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*")

DTYPES = pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [(torch.float32, 0.4, 2e-4), (torch.float64, 1.0, 1e-9)],
    ids=["float32", "float64"],
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


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


# P2: a row does not depend on its batch


def generate(model: TRMForCausalLM, ids: Tensor, mask: Tensor | None, **options: Any) -> list[list[int]]:
    """New tokens of every row."""
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, **(settings | options))
    rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return rows


def alone(model: TRMForCausalLM, prompt: Sequence[int], max_tokens: int, end: int | None = None, **params: Any) -> Any:
    return reference.decode(model, prompt, SamplingParams(max_tokens=max_tokens, **params), end)


@pytest.mark.parametrize(
    "lengths",
    [(1,), (200,), (1, 200), (5, 5, 5), (7, 1, 3, 40), (64, 63, 65, 2, 130), tuple(range(1, 48, 3))],
    ids=lambda lengths: f"{len(lengths)}rows-{min(lengths)}to{max(lengths)}",
)
@DTYPES
def test_left_padded_batch_equals_each_prompt_alone(lengths, dtype, scale, tolerance, kv_source):
    """The predecessor's batches fell into repetition: mask ignored in prefill, positions counted on padding."""
    model = make_model(kv_source=kv_source, scale=scale).to(dtype)
    prompts = [some_prompt(length) for length in lengths]

    rows = generate(model, *pad_left(prompts), max_new_tokens=4)

    for prompt, row in zip(prompts, rows, strict=True):
        assert_same_tokens(row, alone(model, prompt, 4), NEAR_TIE if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_batch_of_other_families_equals_each_prompt_alone(family, kv_source):
    model = make_model(family, kv_source=kv_source, scale=1.0).double()
    prompts = [some_prompt(length) for length in (1, 9, 30)]

    rows = generate(model, *pad_left(prompts))

    assert [tuple(row) for row in rows] == [alone(model, prompt, 6).token_ids for prompt in prompts]


def test_two_layers_equal_each_prompt_alone(kv_source):
    """With more than one layer, an entry that belongs to another layer would go unnoticed elsewhere."""
    model = make_model(kv_source=kv_source, scale=1.0, n_layers=2).double()
    prompts = [some_prompt(length) for length in (2, 17)]

    rows = generate(model, *pad_left(prompts))

    assert [tuple(row) for row in rows] == [alone(model, prompt, 6).token_ids for prompt in prompts]


def test_rows_end_at_their_own_end_token(kv_source):
    """The predecessor stopped only when all rows ended in the same step."""
    model = make_model(kv_source=kv_source, scale=1.0).double()
    prompts = [some_prompt(length) for length in (3, 8, 1, 20)]
    replies = [alone(model, prompt, 8).token_ids for prompt in prompts]
    end = replies[0][2]
    expected = [alone(model, prompt, 8, end).token_ids for prompt in prompts]
    assert len({len(reply) for reply in expected}) > 1, "rows must end at different steps"

    rows = generate(model, *pad_left(prompts), max_new_tokens=8, eos_token_id=end)

    for row, reply in zip(rows, expected, strict=True):
        assert tuple(row[: len(reply)]) == reply
        assert not any(row[len(reply) :]), "after its end a row is padding"


@pytest.mark.parametrize("effort", [0, 1, 5])
def test_batch_equals_alone_at_any_effort(effort, kv_source):
    """Efforts beyond the trained one need more cache entries than the configuration says."""
    model = make_model(kv_source=kv_source, scale=1.0).double()
    prompts = [some_prompt(length) for length in (1, 12)]

    rows = generate(model, *pad_left(prompts), n_supervision=effort)

    assert [tuple(row) for row in rows] == [
        alone(model, prompt, 6, n_supervision=effort).token_ids for prompt in prompts
    ]


@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32], ids=["long", "bool", "float"])
def test_masks_of_any_type_mean_the_same(mask_dtype):
    model = make_model(scale=1.0).double()
    ids, mask = pad_left([some_prompt(12), some_prompt(5)])

    got = model(ids, attention_mask=mask.to(mask_dtype)).logits[1, -5:]

    assert (got - model(torch.tensor([some_prompt(5)])).logits[0]).abs().max() < 1e-9


@pytest.mark.parametrize("pad", [pad_left, pad_right], ids=["left", "right"])
@DTYPES
def test_padding_changes_no_logit_at_real_positions(pad, dtype, scale, tolerance, kv_source):
    model = make_model(kv_source=kv_source, scale=scale).to(dtype)
    prompts = [some_prompt(length) for length in (30, 1, 11)]
    ids, mask = pad(prompts, pad=7)

    logits = model(ids, attention_mask=mask).logits

    for row, prompt in enumerate(prompts):
        expected = model(torch.tensor([prompt])).logits[0]
        assert (logits[row][mask[row].bool()] - expected).abs().max() < tolerance


@pytest.mark.parametrize("pad", [pad_left, pad_right], ids=["left", "right"])
def test_positions_count_real_tokens(pad, monkeypatch):
    """Rotary positions are relative, so default ones go unnoticed until a scaled rope or a limit meets them."""
    model = make_model()
    ids, mask = pad([some_prompt(5), some_prompt(2)])
    seen = []
    original = model.backbone.rope

    def spy(positions: Tensor) -> Any:
        seen.append(positions)
        return original(positions)

    monkeypatch.setattr(model.backbone, "rope", spy)
    model(ids, attention_mask=mask)

    assert seen
    for positions in seen:
        assert positions[0].tolist() == [0, 1, 2, 3, 4]
        assert positions[1][mask[1].bool()].tolist() == [0, 1]


@DTYPES
def test_scaled_rope_counts_real_tokens(dtype, scale, tolerance, kv_source):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    sizes = {"rope_parameters": rope, "max_position_embeddings": 256}
    model = make_model(kv_source=kv_source, scale=scale, sizes=sizes).to(dtype)
    ids, mask = pad_left([some_prompt(100), some_prompt(3)])

    got = model(ids, attention_mask=mask).logits[1, -3:]

    assert (got - model(torch.tensor([some_prompt(3)])).logits[0]).abs().max() < tolerance


def test_generate_refuses_right_padding_and_names_the_remedy():
    ids, mask = pad_right([some_prompt(5), some_prompt(2)])

    with pytest.raises(BadRequest, match="padding_side = 'left'"):
        make_model().generate(ids, attention_mask=mask, max_new_tokens=2)


def test_generate_refuses_right_padding_that_only_the_ids_show():
    """Without a mask transformers derives one from the pad token, and would decode after the padding."""
    ids, _ = pad_right([some_prompt(5), some_prompt(2)])

    with pytest.raises(BadRequest, match="padding_side = 'left'"):
        make_model().generate(ids, max_new_tokens=2)


def test_generate_ends_at_a_string(tokenizer):
    model = make_model()
    ids = torch.tensor([some_prompt(6)])
    whole = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 6:].tolist()
    first = next(token for token in whole if tokenizer.decode([token]).strip())

    ended = model.generate(
        ids, max_new_tokens=6, do_sample=False, stop_strings=[tokenizer.decode([first])], tokenizer=tokenizer
    )

    assert ended[0, 6:].tolist() == whole[: whole.index(first) + 1]


def test_generate_derives_the_mask_of_left_padding():
    model = make_model(scale=1.0).double()
    ids, _ = pad_left([some_prompt(9), some_prompt(2)])

    rows = generate(model, ids, None)

    assert tuple(rows[1]) == alone(model, some_prompt(2), 6).token_ids


def test_a_row_of_padding_gives_no_nan_and_leaves_the_others_alone(kv_source):
    """A softmax over nothing is NaN in some kernels, and then poisons real rows."""
    model = make_model(kv_source=kv_source)
    prompt = some_prompt(6)
    ids = torch.tensor([[0] * 6, prompt])
    mask = torch.tensor([[0] * 6, [1] * 6])

    cache = DynamicCache()
    out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    longer = F.pad(mask, (0, 1), value=1)
    after = model(torch.tensor([[9], [9]]), attention_mask=longer, past_key_values=cache)

    assert out.logits.isfinite().all()
    assert out.halt_logits.isfinite().all()
    assert after.logits.isfinite().all()
    assert torch.allclose(out.logits[1], model(torch.tensor([prompt])).logits[0], atol=2e-4)


# P3: the cache is exact


@pytest.mark.parametrize("n_layers", [1, 2], ids=["L1", "L2"])
@DTYPES
def test_cached_steps_equal_recomputing_the_whole_sequence(dtype, scale, tolerance, n_layers, kv_source):
    """The predecessor kept the last iteration's keys and values and used them at every depth."""
    model = make_model(kv_source=kv_source, scale=scale, n_layers=n_layers).to(dtype)
    ids = torch.tensor([some_prompt(24)])
    expected = model(ids).logits

    cache = DynamicCache()
    pieces = [
        model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([10, 1, 1, 5, 1, 1, 1, 4], 1)
    ]

    assert (torch.cat(pieces, dim=1) - expected).abs().max() < tolerance


@DTYPES
def test_cached_steps_equal_recomputing_in_a_padded_batch(dtype, scale, tolerance, kv_source):
    model = make_model(kv_source=kv_source, scale=scale).to(dtype)
    prompts = [some_prompt(12), some_prompt(1), some_prompt(7)]
    ids, mask = pad_left(prompts)
    new = torch.tensor([some_prompt(4, seed=row) for row in range(3)])

    cache = DynamicCache()
    model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    steps = []
    for index in range(4):
        mask = F.pad(mask, (0, 1), value=1)
        out = model(new[:, index : index + 1], attention_mask=mask, past_key_values=cache, use_cache=True)
        steps.append(out.logits[:, 0])

    for row, prompt in enumerate(prompts):
        whole = torch.tensor([[*prompt, *new[row].tolist()]])
        expected = model(whole).logits[0, -4:]
        assert (torch.stack(steps, dim=1)[row] - expected).abs().max() < tolerance


def test_cache_holds_exactly_the_entries_that_the_configuration_counts(kv_source):
    model = make_model(kv_source=kv_source, n_layers=2)

    cache = model(torch.tensor([some_prompt(5)]), use_cache=True).past_key_values

    filled = [layer for layer in cache.layers if layer.get_seq_length() == 5]
    assert len(filled) == len(cache.layers) == 2 + model.config.cache_entries(3)
    assert model.config.cache_entries(3) == (2 if kv_source == "context" else 3 * 2 * 3 * 2)


@pytest.mark.parametrize("effort", [0, 2])
@pytest.mark.parametrize("family", BACKBONES)
def test_beam_search_scores_equal_recomputed_ones(family, effort, kv_source):
    """Beams are moved between rows at every step: every entry of the cache has to move along."""
    model = make_model(family, kv_source=kv_source, scale=1.0).double()
    prompts = [some_prompt(6), some_prompt(2)]
    ids, mask = pad_left(prompts)

    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=5,
        num_beams=4,
        num_return_sequences=2,
        eos_token_id=None,
        pad_token_id=0,
        length_penalty=0.0,
        n_supervision=effort,
        return_dict_in_generate=True,
        output_scores=True,
        do_sample=False,
    )

    assert out.sequences.shape == (4, 11)
    for index, sequence in enumerate(out.sequences):
        prompt = prompts[index // 2]
        tokens = torch.tensor([[*prompt, *sequence[6:].tolist()]])
        logprobs = model(tokens, n_supervision=effort).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = logprobs.gather(1, sequence[6:, None]).sum()
        assert out.sequences_scores[index].item() == pytest.approx(expected.item(), abs=1e-5)  # summed in float32


def test_sampled_sequences_come_from_the_exact_distribution(kv_source):
    """`num_return_sequences` samples share a prompt; each step's logits equal those of a pass without cache."""
    model = make_model(kv_source=kv_source, scale=1.0).double()
    prompt = some_prompt(6)
    torch.manual_seed(0)

    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 6, dtype=torch.long),
        max_new_tokens=5,
        do_sample=True,
        temperature=1.5,
        top_k=0,
        num_return_sequences=3,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )

    assert out.sequences.shape == (3, 11)
    assert len({tuple(row) for row in out.sequences.tolist()}) > 1
    expected = model(out.sequences).logits[:, 5:-1]
    assert (torch.stack(out.logits, dim=1) - expected).abs().max() < 1e-5  # transformers keeps them in float32


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


# What transformers calls the cache: `cache` from 5.24 on, `past_key_values` before. Both work with both.


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_two_names(name, kv_source):
    model = make_model(kv_source=kv_source)
    ids = torch.tensor([some_prompt(8)])
    cache = DynamicCache()

    out = model(ids[:, :6], use_cache=True, **{name: cache})
    after = model(ids[:, 6:], **{name: out[name]}).logits

    assert out[name] is getattr(out, name) is out.get(name) is cache
    assert name in out
    assert torch.allclose(after, model(ids).logits[:, 6:], atol=1e-4)


def test_an_output_without_a_cache_has_neither_name():
    out = make_model()(torch.tensor([some_prompt(3)]))

    assert out.cache is out.past_key_values is None
    assert "cache" not in out
    assert "past_key_values" not in out
    assert out.get("past_key_values", 1) == 1


def test_an_outputs_cache_can_be_set_by_either_name():
    out = make_model()(torch.tensor([some_prompt(3)]))

    out.past_key_values = first = DynamicCache()
    assert out.cache is first
    out["past_key_values"] = second = DynamicCache()

    assert out.cache is out["cache"] is second
    assert "past_key_values" not in list(out.keys())


def test_one_cache_by_both_names_is_one():
    model, ids, cache = make_model(), torch.tensor([some_prompt(3)]), DynamicCache()

    assert model(ids, cache=cache, past_key_values=cache).cache is cache


def test_two_caches_are_refused():
    model, ids = make_model(), torch.tensor([some_prompt(3)])

    with pytest.raises(BadRequest, match="one of them"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(BadRequest, match="one of them"):
        model.generate(ids, max_new_tokens=2, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_goes_on_from_a_cache_of_either_name_and_prints_nothing(name, capfd):
    model, ids = make_model(), torch.tensor([some_prompt(8)])
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    cache = DynamicCache()
    model(ids[:, :6], use_cache=True, **{name: cache})

    got = model.generate(ids, **{name: cache}, **settings)

    assert got.tolist() == expected.tolist()
    assert capfd.readouterr() == ("", "")


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


# The real tokenizer


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_chat_prompts_of_the_real_tokenizer_equal_solo_runs(qwen2_tokenizer, tied, kv_source):
    """Vocabulary 151,936 is larger than the tokenizer's: the rest of the head must do no harm."""
    sizes = {
        "vocab_size": 151_936,
        "num_hidden_layers": 1,
        "eos_token_id": 151_645,
        "pad_token_id": 151_643,
        "tie_word_embeddings": tied,
    }
    model = make_model(kv_source=kv_source, sizes=sizes, n_supervision=2)
    chat = ChatFormat(qwen2_tokenizer)
    questions = ["What is 2 + 2?", "Natalia sold 48 clips in April, and half as many in May. How many altogether?", "1"]
    prompts = [chat.encode(solve_messages(question)) for question in questions]
    qwen2_tokenizer.padding_side = "left"
    padded = qwen2_tokenizer.pad({"input_ids": prompts}, return_tensors="pt")

    rows = generate(model, padded["input_ids"], padded["attention_mask"], pad_token_id=151_643)

    for prompt, row in zip(prompts, rows, strict=True):
        assert_same_tokens(row, alone(model, prompt, 6), NEAR_TIE)


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
