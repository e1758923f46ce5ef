"""Settings of the training commands, with their defaults. One frozen class per command.

A leaf, and light: `--help` imports nothing else of this package.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliVariadicArg, NoDecode

from trm.chat import Work
from trm.errors import ConfigError
from trm.settings import Settings

Device = Literal["auto", "cpu", "cuda"]
OptimizerName = Literal["adamw", "muon"]
StepWeights = Literal["uniform", "linear", "last"]
MixDepths = Literal["off", "steps", "halting"]
CacheStates = Literal["auto", "memory", "disk", "off"]
Replies = Literal["worked", "equations", "answer"]
DATASET_HELP = "gsm8k, numina, math, synthetic[:FAMILY[*WEIGHT],…] or a JSON-lines file"


def split_words(value: Any) -> Any:
    """Words with commas or spaces between them as a list, and so a single number of a file; anything else as it is."""
    return [value] if isinstance(value, int) else value.replace(",", " ").split() if isinstance(value, str) else value


class TrainSettings(Settings):
    """Train a recursive decoder on a frozen backbone and write servable checkpoints.

    trm-train --dataset my.jsonl --output-dir runs/mine    lines of {"question": …, "answer": "… #### 72"}
    trm-train --resume runs/mine                           goes on, after Ctrl-C, a crash or a reboot
    trm-serve --model runs/mine/checkpoint-1000            serves the result
    """

    command: ClassVar[str] = "trm-train"
    groups: ClassVar[Mapping[str, Sequence[str]]] = {
        "data": (
            "dataset",
            "num_problems",
            "max_length",
            "replies",
            "keep_annotations",
            "normalize_text",
            "validation",
            "validation_problems",
        ),
        "the run and its directory": ("output_dir", "resume", "init_from", "save_steps", "keep_last"),
        "how long, how fast": (
            "epochs",
            "max_steps",
            "batch_size",
            "gradient_accumulation",
            "optimizer",
            "lr",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "seed",
        ),
        "the model (fixed for the life of a decoder)": (
            "backbone",
            "backbone_revision",
            "n_latent",
            "n_cycles",
            "n_supervision",
            "n_layers",
            "expansion",
            "max_supervision",
            "kv_source",
            "context_layers",
            "gradient",
            "train_lm_head",
        ),
        "the objective": (
            "step_targets",
            "min_supervision",
            "skip_supervision",
            "step_weights",
            "halt_delta",
            "mix_depths",
            "train_vocabulary",
        ),
        "the machine": ("cache_states", "cache_dir", "device", "autocast", "num_threads"),
    }

    dataset: str | None = Field(None, description=DATASET_HELP)
    backbone: str | None = Field(
        None, description="directory, hub id or GGUF file of a Qwen2, Qwen3 or Llama model; default the bundled one"
    )
    backbone_revision: str | None = Field(None, description="revision of a hub backbone")
    backbone_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="type of the frozen weights; auto: bfloat16 on cuda, and for large ones on a CPU that has it",
    )
    output_dir: Path = Field(Path("runs/trm"), description="run directory; checkpoints go to checkpoint-STEP inside")
    resume: Path | None = Field(
        None,
        description="checkpoint to go on from, or run directory, whose newest whole checkpoint is taken; settings come "
        "from there, and so does the run directory unless --output-dir is given",
    )
    init_from: Path | None = Field(
        None,
        description="checkpoint whose decoder a new run begins with, in place of a random one; its backbone and the "
        "model's settings come from there",
    )
    num_problems: int = Field(20_000, ge=1, description="how many synthetic problems to draw")
    validation: str | None = Field(
        None,
        description="problems to measure the loss on, named as for --dataset; by default the synthetic held-out split, "
        "or rows taken out of the data",
    )
    validation_problems: int = Field(
        256,
        ge=0,
        description="how many of them, at most a tenth of the data if taken out of it; "
        "with 0 nothing is measured, and no checkpoint is best",
    )
    epochs: int = Field(1, ge=1, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimiser steps")
    batch_size: int = Field(4, ge=1, description="problems per batch")
    gradient_accumulation: int = Field(1, ge=1, description="batches per optimiser step")
    max_length: int = Field(
        1024, ge=2, description="most tokens of a problem with its solution; longer ones are dropped"
    )
    replies: Annotated[CliVariadicArg[list[Replies]], NoDecode] = Field(
        ["worked"],
        min_length=1,
        description="what replies say before the boxed answer: the solution, its equations alone, or nothing; "
        "of several each problem gives one example of each",
    )
    optimizer: OptimizerName = Field("adamw", description="adamw, or muon for the block's matrices")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay on matrices")
    warmup_steps: int | None = Field(
        None, ge=0, description="steps until the learning rate is at its peak; default a tenth of the run, at most 2000"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    n_latent: int = Field(6, ge=1, description="latent updates per cycle (the paper's n)")
    n_cycles: int = Field(3, ge=1, description="cycles per supervision step (T)")
    n_supervision: int = Field(16, ge=1, description="supervision steps: the trained depth (N_sup)")
    n_layers: int = Field(1, ge=1, description="layers of the block that is applied over and over (L)")
    expansion: float = Field(4.0, gt=0, description="width of its feed-forward part, in hidden sizes times 2/3")
    max_supervision: int | None = Field(
        None, ge=1, description="deepest effort to allow when serving; default 4 N_sup, at least 16"
    )
    kv_source: Literal["context", "state"] = Field(
        "context",
        description="where keys and values come from: the backbone's states, or the recursion's own as in the paper",
    )
    context_layers: Annotated[CliVariadicArg[list[int]], NoDecode] = Field(
        [],
        description="mix the backbone's states after each of these numbers of layers, by learned weights, into what "
        "keys and values come from; 0: the embeddings, the last: all layers; default the last alone",
    )
    gradient: Literal["full", "paper"] = Field(
        "full",
        description="full: through the whole recursion; paper: through the last cycle of each supervision step",
    )
    step_targets: bool = Field(
        False,
        description="in replies that are the answer alone, supervision step t learns the t-th intermediate result",
    )
    min_supervision: int | None = Field(
        None,
        ge=1,
        description="draw the supervision steps of each optimiser step from this number to N_sup; default always N_sup",
    )
    skip_supervision: int = Field(
        0,
        ge=0,
        description="before half of the optimiser steps, run 1 to this many supervision steps without gradient, so "
        "that the answer holds at depths beyond N_sup (--gradient full)",
    )
    step_weights: StepWeights = Field(
        "uniform", description="how the supervision steps' losses are weighted: equally, rising, the last only"
    )
    halt_delta: float = Field(
        0.05,
        ge=0,
        description="a token may halt where no deeper step lowers its loss by more than this (--gradient full)",
    )
    mix_depths: MixDepths = Field(
        "off",
        description="let each row have a depth of its own (--gradient paper); steps: it is replaced after N_sup steps; "
        "halting: also as soon as its halting head is sure of all its tokens",
    )
    train_vocabulary: Literal["all", "seen"] = Field(
        "all",
        description="tokens that labels are told from: all, or only those that are a label somewhere in the data, "
        "which is faster with a large vocabulary; validation and serving always take all",
    )
    train_lm_head: bool = Field(False, description="also train an untied copy of the output head")
    keep_annotations: bool = Field(False, description="keep GSM8K's <<48/2=24>> calculator annotations")
    normalize_text: bool = Field(
        True, description="convert typographic quotes and dashes to ASCII, then normalise to NFC"
    )
    cache_states: CacheStates = Field(
        "auto", description="where backbone states are kept between epochs; auto: the best place with room"
    )
    cache_dir: Path | None = Field(
        None, description="directory for --cache-states disk; default cache/ in the run directory"
    )
    save_steps: int = Field(500, ge=1, description="optimiser steps between checkpoints")
    keep_last: int = Field(
        3, ge=1, description="how many of the last checkpoints to keep, besides the one with the lowest validation loss"
    )
    seed: int = Field(0, ge=0, description="seed of weights, data order and synthetic problems")
    device: Device = Field("auto", description="where to train")
    autocast: Literal["auto", "on", "off"] = Field(
        "auto", description="bfloat16 matrix products; auto: where the device has them"
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads; by default torch chooses")

    @field_validator("replies", "context_layers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_words(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        minimum = self.min_supervision
        if minimum is not None and minimum > self.n_supervision:
            raise ConfigError(f"--min-supervision {minimum}: must be at most --n-supervision {self.n_supervision}")
        if self.gradient == "paper":
            if minimum not in (None, self.n_supervision):
                raise ConfigError(
                    f"--min-supervision {minimum}: --gradient paper runs every supervision step; use --gradient full"
                )
            if self.skip_supervision:
                raise ConfigError(
                    f"--skip-supervision {self.skip_supervision}: --gradient paper carries the states of all steps "
                    "already; use --gradient full"
                )
            if self.step_weights != "uniform":
                raise ConfigError(
                    f"--step-weights {self.step_weights}: with --gradient paper each supervision step has an optimiser "
                    "step of its own; use --gradient full"
                )
        if self.train_vocabulary == "seen" and self.train_lm_head:
            raise ConfigError("--train-vocabulary seen: the head must stay frozen; leave out --train-lm-head")
        if self.mix_depths != "off":
            if self.gradient != "paper":
                raise ConfigError(
                    f"--mix-depths {self.mix_depths}: only detached steps can be mixed; use --gradient paper"
                )
            if self.gradient_accumulation > 1:
                raise ConfigError(
                    f"--mix-depths {self.mix_depths}: works without --gradient-accumulation only; "
                    "use a larger --batch-size"
                )
            if self.step_targets:
                raise ConfigError(
                    f"--mix-depths {self.mix_depths}: the rows of a batch stand at different steps, "
                    "which with --step-targets have different targets; leave out one of the two"
                )
        return self


class EvalSettings(Settings):
    """Measure greedy accuracy per effort, next to the frozen backbone and to controls on the same problems."""

    command: ClassVar[str] = "trm-eval"

    model: str | None = Field(None, description="checkpoint directory or hub id; default the bundled model")
    dataset: str = Field("synthetic", description=DATASET_HELP)
    effort: Annotated[CliVariadicArg[list[int]], NoDecode] = Field(
        [], description="supervision steps to try; default 0, 1 and the trained number"
    )
    work: Work | None = Field(
        None, description="what the prompt asks for besides the answer; default full, for synthetic:mental none"
    )
    limit: int = Field(500, ge=1, description="number of problems, or all where there are fewer")
    seed: int = Field(0, ge=0, description="seed of the synthetic problems and of samples")
    baseline: str | None = Field(
        None,
        description="what every effort is compared with: backbone (this model at effort 0), or the directory or hub id "
        "of another model, recursive or plain, at effort 0; default effort 0 if it is among the efforts",
    )
    control: Annotated[CliVariadicArg[list[str]], NoDecode] = Field(
        [], description="models to compare the trained effort with: plain ones, and recursive ones at theirs"
    )
    samples: int = Field(1, ge=1, description="if above 1, also sample this many replies per problem and take a vote")
    max_tokens: int = Field(512, ge=1, description="longest reply")
    max_rows: int = Field(32, ge=1, description="problems decoded together")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "float32", description="precision, of controls and the baseline too; auto: as trm-serve chooses for this model"
    )
    report: Path | None = Field(
        None,
        description="directory for report.json, tables, answers and pictures; if interrupted, the same command goes on",
    )
    device: Device = Field("auto", description="where to run")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; by default torch chooses")

    @field_validator("effort", "control", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_words(value)


class SampleSettings(Settings):
    """Let a model solve training problems, several times each, and keep what is right as rows to train on.

    trm-sample --model runs/mine/checkpoint-1000 --dataset my.jsonl --output own.jsonl    the same command goes on
    trm-train --dataset own.jsonl --output-dir runs/own                                   trains on what was kept
    """

    command: ClassVar[str] = "trm-sample"

    model: str | None = Field(
        None,
        description="checkpoint, or plain model of the Qwen2, Qwen3 or Llama family: directory or hub id; "
        "default the bundled model",
    )
    dataset: str = Field("synthetic", description=DATASET_HELP)
    output: Path = Field(
        Path("runs/solutions.jsonl"),
        description="JSON-lines file of the right replies; settings and all replies lie beside it",
    )
    limit: int | None = Field(None, ge=1, description="number of problems; default all, or 20000 synthetic ones")
    samples: int = Field(4, ge=1, description="replies per problem")
    temperature: float = Field(0.7, ge=0, le=2, description="of the replies; 0 is greedy, with --samples 1")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens that have this probability")
    effort: int | None = Field(
        None, ge=0, description="supervision steps; default the trained number, and 0 for a plain model"
    )
    keep: int = Field(4, ge=1, description="most replies to keep of a problem; no two have the same equations")
    keep_solved: bool = Field(False, description="keep also problems that all of several replies solve")
    max_tokens: int = Field(512, ge=1, description="longest reply; one that is cut off there is not kept")
    max_rows: int = Field(32, ge=1, description="replies decoded together")
    seed: int = Field(0, ge=0, description="seed of the synthetic problems and of samples")
    device: Device = Field("auto", description="where to run")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="precision, as for trm-serve")
    quantize: Literal["int8"] | None = Field(None, description="the backbone's linear layers in int8, on a CPU")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; by default torch chooses")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"--samples {self.samples}: at --temperature 0 all are the same; "
                "use --samples 1, or a temperature above 0"
            )
        return self


class PretrainSettings(Settings):
    """Make the small tokenizer and backbone that the bundled model stands on."""

    command: ClassVar[str] = "trm-pretrain"

    output_dir: Path = Field(
        Path("runs/backbone"), description="where tokenizer and backbone go; an unfinished run there goes on"
    )
    text_file: Path | None = Field(
        None, description="JSON-lines file with more problems, for their wording (GSM8K's training set)"
    )
    families: Annotated[CliVariadicArg[list[str]], NoDecode] = Field(
        ["easy", "all"], description="families or groups of synthetic problems; problems come from each in turn"
    )
    max_steps: int = Field(5_000, ge=1, description="optimiser steps")
    batch_size: int = Field(64, ge=1, description="problems per step")
    lr: float = Field(1.2e-2, gt=0, description="peak learning rate of Muon")
    hidden_size: int = Field(256, ge=64, multiple_of=64, description="width; heads have 32 units")
    num_layers: int = Field(4, ge=1, description="depth")
    vocab_size: int = Field(2048, ge=300, description="size of the tokenizer")
    seed: int = Field(0, ge=0, description="seed of weights and problems")
    device: Device = Field("auto", description="where to train")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; by default torch chooses")

    @field_validator("families", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_words(value)
