"""What a run costs, by arithmetic: `python -m training.research.costs [flags of trm-train]`.

Reads configuration, tokenizer and data, never the weights; docs/training.md has the formulas. Counts products of
matrices, two operations per weight and token, and takes the halting head, norms and updates for free.
Legend: D hidden, A all query heads, K all key/value heads, F feed-forward width, V vocabulary, L layers.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM

from training.batches import PAD_MULTIPLE, epoch_order
from training.building import model_settings
from training.config import TrainSettings
from training.cross_entropy import BLOCKS
from training.problems.data import encode_problems, load_problems
from trm import bundled_model_path, checkpoint
from trm.chat import ChatFormat, Example
from trm.config import TRMConfig
from trm.model import Decoder
from trm.settings import run_command

ADAMW_COPIES = 5  # float32 numbers per trained weight: master, average, gradient and two moments
USABLE_FLOPS = {"H100 at 30 %": 0.3 * 989e12, "A100 at 30 %": 0.3 * 312e12}  # of the dense bfloat16 peak


class CostSettings(TrainSettings):
    """Count what a training run with these flags of trm-train costs. Nothing is trained."""

    command: ClassVar[str] = "python -m training.research.costs"


@dataclass(frozen=True)
class BatchSizes:
    """Means over the batches of an epoch: rows B, padded width S, queries Q per row, labels M of all rows."""

    rows: float
    positions: float
    queries: float
    labels: float


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one batch: the backbone's pass, the recursion and the readouts of all its steps."""

    backbone: float
    recursion: float
    readout: float

    @property
    def total(self) -> float:
        return self.backbone + self.recursion + self.readout


def batch_sizes(examples: Sequence[Example], batch_size: int, seed: int, kv_source: str) -> BatchSizes:
    """What the batches of the first epoch look like."""
    lengths = [len(e.ids) for e in examples]
    answers = [len(e.ids) - e.label_start for e in examples]
    batches = epoch_order(lengths, batch_size, seed, 0)
    positions = [-(-max(lengths[i] for i in batch) // PAD_MULTIPLE) * PAD_MULTIPLE for batch in batches]
    queries = positions if kv_source == "state" else [max(answers[i] for i in batch) for batch in batches]
    return BatchSizes(len(examples) / len(batches), fmean(positions), fmean(queries), sum(answers) / len(batches))


def operations(config: TRMConfig, sizes: BatchSizes, gradient: str, train_lm_head: bool) -> Operations:
    """One batch through all its supervision steps, forward and backward.

    With full gradient a step's recursion is computed forward twice, and backward at twice the forward's price.
    With the paper's, one cycle of each step is computed forward and backward, the others forward.
    The readout takes two products of the head's size, see `training.cross_entropy`; four if it is trained.
    """
    backbone, d = config.backbone_config, config.hidden_size
    heads, kv_heads = (n * config.head_dim for n in (backbone.num_attention_heads, backbone.num_key_value_heads))
    tokens, queries = sizes.rows * sizes.positions, sizes.rows * sizes.queries
    attention = 4 * heads * sizes.positions
    layer = 2 * (2 * d * heads + 2 * d * kv_heads + 3 * d * backbone.intermediate_size) + attention
    key_value = 4 * d * kv_heads
    inside = key_value if config.kv_source == "state" else 0
    call = queries * config.n_layers * (2 * (2 * d * heads + 3 * d * config.intermediate_size) + inside + attention)
    context = 0 if config.kv_source == "state" else tokens * config.n_layers * key_value
    steps, head_products = config.n_supervision, 4 if train_lm_head else 2
    readout = 2 * sizes.labels * d * config.vocab_size * steps * head_products
    if gradient == "full":
        recursion = 4 * steps * config.calls_per_step * call + 2 * context
    else:
        one_cycle = config.calls_per_step // config.n_cycles
        recursion = steps * ((config.calls_per_step + 2 * one_cycle) * call + 2 * context)
    return Operations(tokens * backbone.num_hidden_layers * layer, recursion, readout)


def weights(config: TRMConfig) -> tuple[int, int]:
    """Weights of the backbone, a tied head counted once, and weights that training owns."""
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config.backbone_config)
        decoder = Decoder(config)
    trained = sum(p.numel() for p in decoder.parameters())
    head = config.vocab_size * config.hidden_size if config.own_lm_head else 0
    return sum(p.numel() for p in backbone.parameters()), trained + head


def memory(config: TRMConfig, sizes: BatchSizes, backbone_bytes: int, gradient: str) -> dict[str, float]:
    """Bytes by use, with activations in float32. Of logits there is a block, in float32 and twice in bfloat16."""
    frozen, trained = weights(config)
    queries, d = sizes.rows * sizes.queries, config.hidden_size
    cycles = 1 if gradient == "paper" else config.n_cycles
    call = 4 * (6 * d + 4 * config.intermediate_size) * config.n_layers
    rows, columns = BLOCKS["cuda"]
    kept_steps = config.n_supervision if gradient == "full" else 1
    return {
        "backbone": backbone_bytes * frozen,
        "masters, average, AdamW, gradients": 4 * ADAMW_COPIES * trained,
        "activations of one step": queries * call * cycles * (config.n_latent + 1),
        "block of logits": 8 * min(rows, sizes.labels) * min(columns, config.vocab_size),
        "states (y, z) of all steps, gradients at their labels": (8 * queries + 4 * sizes.labels) * d * kept_steps,
    }


def main() -> None:
    """Parse, count, print."""
    settings = CostSettings.from_command_line()
    source, revision = settings.backbone or str(bundled_model_path()), settings.backbone_revision
    config = TRMConfig(backbone_config=checkpoint.read_backbone_config(source, revision), **model_settings(settings))
    chat = ChatFormat(checkpoint.read_tokenizer(source, revision), settings.normalize_text)
    problems = load_problems(
        settings.dataset or "synthetic", split="train", seed=settings.seed, num_problems=settings.num_problems
    )
    examples = encode_problems(problems, chat, settings.max_length, settings.replies, settings.step_targets)
    sizes = batch_sizes(examples, settings.batch_size, settings.seed, config.kv_source)
    work = operations(config, sizes, settings.gradient, settings.train_lm_head)
    bytes_used = memory(config, sizes, 4 if settings.backbone_dtype == "float32" else 2, settings.gradient)
    per_thousand = 1000 / sizes.rows
    report = {
        "weights": dict(zip(("backbone", "trained"), weights(config), strict=True)),
        "batch": asdict(sizes),
        "gigabytes": {name: value / 1e9 for name, value in bytes_used.items()}
        | {"sum": sum(bytes_used.values()) / 1e9},
        "teraflop_per_1000_problems": {
            name: value * per_thousand / 1e12 for name, value in (asdict(work) | {"sum": work.total}).items()
        },
        "minutes_per_1000_problems": {
            name: work.total * per_thousand / peak / 60 for name, peak in USABLE_FLOPS.items()
        },
    }
    for name, values in report.items():
        print(f"{name.replace('_', ' ')}: " + ", ".join(f"{key} {value:,.4g}" for key, value in values.items()))  # noqa: T201
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    run_command(main, CostSettings.command)
