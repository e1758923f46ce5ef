"""Batches equal to solo runs (P2), through `forward` and transformers' own `generate`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from tests.conftest import make_model
from tests.trm.conftest import DTYPES, NEAR_TIE, alone, assert_same_tokens, generate, pad_left, pad_right, some_prompt
from trm.chat import ChatFormat, solve_messages
from trm.errors import BadRequest

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*"),
]


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
