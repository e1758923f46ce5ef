"""The cache is exact (P3), through `forward` and transformers' own `generate`; and what transformers calls it."""

import pytest
import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from tests.conftest import BACKBONES, make_model
from tests.trm.conftest import DTYPES, pad_left, some_prompt
from trm.errors import BadRequest

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*"),
]


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
