"""The configuration: what it counts, what efforts are called, and what it refuses."""

import pytest
from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from trm import TRMConfig
from trm.errors import ConfigError


@pytest.mark.parametrize(
    ("kv_source", "n_layers", "entries"), [("state", 1, 336), ("state", 2, 672), ("context", 1, 1), ("context", 2, 2)]
)
def test_cache_entries_of_the_papers_depth(kv_source, n_layers, entries):
    """16 steps of 3 cycles of 7 calls: one entry per call and layer with "state", per layer with "context"."""
    config = TRMConfig(kv_source=kv_source, n_layers=n_layers)

    assert (config.n_latent, config.n_cycles, config.n_supervision) == (6, 3, 16)
    assert config.cache_entries(16) == entries


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (16, (0, 1, 4, 8, 16, 24, 32)),
        (4, (0, 1, 1, 2, 4, 6, 8)),
        (3, (0, 1, 1, 2, 3, 5, 6)),
        (1, (0, 1, 1, 1, 1, 2, 2)),
    ],
)
def test_named_efforts(n, expected):
    config = TRMConfig(n_supervision=n)

    names = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
    assert tuple(config.effort_steps(name) for name in names) == expected
    with pytest.raises(ConfigError, match=r"'extreme'.*minimal"):
        config.effort_steps("extreme")


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: GPT2Config(), "'gpt2'.*qwen2, qwen3, llama"),
        (lambda: {"model_type": "mamba", "hidden_size": 8}, "'mamba'.*qwen2, qwen3, llama"),
        (lambda: {"hidden_size": 8}, "None.*qwen2, qwen3, llama"),
        (
            lambda: Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=2),
            "sliding-window attention.*use_sliding_window to false",
        ),
        (
            lambda: Qwen3Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=2),
            "sliding-window attention.*use_sliding_window to false",
        ),
        (lambda: LlamaConfig(hidden_act="gelu"), "activation is 'gelu'; supported: 'silu'"),
        (lambda: {"model_type": "qwen3", "hidden_act": "relu"}, "activation is 'relu'"),
        (
            lambda: LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
            "'dynamic'.*default, linear",
        ),
        (
            lambda: Qwen2Config(
                hidden_size=32,
                num_attention_heads=4,
                original_max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 64,
                },
            ),
            "'longrope'.*default, linear",
        ),
    ],
    ids=[
        "gpt2",
        "dict-of-mamba",
        "dict-of-nothing",
        "sliding-window",
        "sliding-window-qwen3",
        "gelu",
        "dict-with-relu",
        "dynamic-rope",
        "longrope",
    ],
)
def test_backbones_that_cannot_be_exact_are_refused_by_name(make_config, message):
    with pytest.raises(ConfigError, match=message):
        TRMConfig(backbone_config=make_config())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_latent": 0}, "n_latent is 0"),
        ({"work": ["full", "some"]}, "work holds 'some'; it may hold full, equations, none"),
        (
            {"context_layers": [2, 0]},
            r"context_layers is \[2, 0\]; it must rise from at least 0 to 32, the whole backbone",
        ),
        ({"context_layers": [0, 1]}, r"\[0, 1\]"),
        ({"context_layers": [-1, 32]}, "from at least 0"),
        ({"context_layers": [0, 32], "kv_source": "state"}, "there is no context"),
        ({"n_cycles": -1}, "n_cycles is -1"),
        ({"n_supervision": 0}, "n_supervision is 0"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"kv_source": "both"}, "'both'.*context, state"),
        ({"max_supervision": 2}, "max_supervision 2 is below n_supervision 16"),
        ({"expansion": 0.0}, "expansion"),
        ({"expansion": -1.0}, "expansion"),
        ({"expansion": float("nan")}, "expansion"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else " ",
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        TRMConfig(**settings)
