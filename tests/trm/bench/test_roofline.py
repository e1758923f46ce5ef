"""The counts follow from the model's own tensors, and a round's times add up."""

import pytest
from torch import nn

from tests.conftest import make_model
from trm import bundled_model_path
from trm.bench import decode, roofline
from trm.bench.decode import LEAST_REQUESTS, LEAST_TOKENS, MEDIAN_TOKENS, affordable
from trm.bench.roofline import Machine, Work, work
from trm.engine.runner import Runner

EFFORT, ROWS, CONTEXT = 2, 3, 10


def linear(module):
    """Weights of linear layers."""
    return {name: part.weight.numel() for name, part in module.named_modules() if isinstance(part, nn.Linear)}


@pytest.mark.parametrize("kv_source", ["context", "state"])
def test_weights_are_those_of_the_linear_layers(kv_source):
    model = make_model(kv_source=kv_source, n_layers=2)
    parts = work(model.config, ROWS, 0, EFFORT, weight_bytes=4, state_bytes=2)
    block = linear(model.decoder.layers)
    if kv_source == "context":  # projected once for each token, not in every call
        block = {name: count for name, count in block.items() if "k_proj" not in name and "v_proj" not in name}
    calls = EFFORT * model.config.calls_per_step
    expected = {
        "backbone": sum(linear(model.backbone.layers).values()),
        "recursion": calls * sum(block.values()),
        "head": model.backbone.lm_head.weight.numel(),
    }

    sizes = {"backbone": 4, "recursion": 2, "head": 4}
    assert {name: part.bytes for name, part in parts.items()} == {name: sizes[name] * n for name, n in expected.items()}
    assert {name: part.operations for name, part in parts.items()} == {
        name: 2 * ROWS * n for name, n in expected.items()
    }


def test_every_row_reads_its_cache_in_every_call():
    model = make_model()
    without, with_context = (work(model.config, ROWS, context, EFFORT, 4, 4) for context in (0, CONTEXT))
    added = {name: with_context[name].bytes - without[name].bytes for name in without}
    per_position = Runner.bytes_per_position(model, 1)  # one entry for the recursion, which each call reads
    entry = per_position // (model.config.backbone_config.num_hidden_layers + 1)
    calls = EFFORT * model.config.calls_per_step

    assert added == {
        "backbone": ROWS * CONTEXT * (per_position - entry),
        "recursion": ROWS * CONTEXT * entry * calls,
        "head": 0,
    }


def test_the_floor_is_the_slower_of_reading_and_computing():
    machine = Machine(bytes_per_s=10.0, operations_per_s=100.0)

    assert Work(20, 100).floor_s(machine) == 2.0
    assert Work(20, 300).floor_s(machine) == 3.0


def test_times_of_a_round_add_up(chat, monkeypatch):
    monkeypatch.setattr(roofline, "READ_BYTES", 2**20)
    monkeypatch.setattr(roofline, "CONTEXT", 32)
    monkeypatch.setattr(roofline, "MAX_ROUNDS", 2)
    model = make_model(sizes={"vocab_size": len(chat.tokenizer)})
    found = roofline.measure(model, chat, max_rows=2, quantize=None, repeats=1)

    assert [(line["rows"], line["effort"]) for line in found["lines"]] == [(1, 0), (1, 3), (2, 0), (2, 3)]
    for line in found["lines"]:
        spent = line["spent_s"]
        assert set(spent) == {"linear", "attention", "other operations", "sampling", "Python"}
        assert all(spent[kind] > 0 for kind in ("linear", "attention", "other operations", "sampling"))
        assert sum(spent.values()) >= line["round_s"] > 0
        assert line["share"] == line["floor_s"] / line["round_s"]
    assert found["lines"][0]["work"]["recursion"] == {"bytes": 0, "operations": 0}
    assert f"| 2, 3 | {1e3 * found['lines'][3]['round_s']:.1f} |" in roofline.table(found)


@pytest.mark.parametrize(
    ("token_s", "prompt_s", "expected"),
    [
        (0.001, 0.1, (64, MEDIAN_TOKENS)),
        (0.075, 0.4, (4, 18)),
        (0.01, 2.0, (9, 16)),
        (100.0, 100.0, (LEAST_REQUESTS, LEAST_TOKENS)),
    ],
)
def test_slow_models_get_fewer_requests_and_shorter_replies(token_s, prompt_s, expected):
    """By hand, a prompt of the measurement being four times as long as a question."""
    line = {"round_s": token_s, "prompt_s": prompt_s}

    assert affordable(64, {"context": 320, "lines": [{}, line]}) == expected


def test_decoding_on_a_plain_backbone_says_what_it_is(backbone_directory, monkeypatch):
    monkeypatch.setattr(roofline, "READ_BYTES", 2**20)
    monkeypatch.setattr(roofline, "MAX_ROUNDS", 2)
    monkeypatch.setattr(decode, "reference_sizes", lambda: {"tokens": 1, "context_s": 1.0, "state_s": 1.0})
    monkeypatch.setattr(decode, "affordable", lambda *_: (3, 8))
    settings = decode.DecodeSettings(
        model=str(backbone_directory), device="cpu", dtype="float32", max_rows=2, repeats=1, num_threads=1
    )
    result = decode.measure(settings)
    text = decode.table({**result, "max_rows": 2, "threads": 1, "torch": "2"})

    assert result["untrained"]
    assert result["requests"] == 3
    assert result["raw"]["throughput"]["requests_equal_to_sequential"] == 3
    assert "only 3 requests, with replies of 8 tokens in the median instead of 90" in text
    assert "The decoder is untrained" in text
    assert "| share of the floor |" in text


def test_the_bundled_model_is_trained():
    assert not decode.is_untrained(bundled_model_path())
