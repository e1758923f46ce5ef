"""Rebuild the bundled model from nothing: tokenizer, backbone, decoder, evaluation, model card.

`make model` runs this. The recipe is the code below; what it measured stands in the card and
in `report.json` beside the weights.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from training.config import EvalSettings, PretrainSettings, TrainSettings
from training.evaluation.run import evaluate_model
from training.pretrain import pretrain
from training.run import train
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.settings import configure_logging

NUM_PROBLEMS = 38_400
MAX_SUPERVISION = 16
EVALUATIONS = {"easy": ("synthetic:easy", 1000), "all": ("synthetic", 500)}
EFFORTS = [0, 1, 2, 4, 8, 16]

# ruff: noqa: E501 - table rows of the card stay on one line
CARD = r"""# The bundled model

A small recursive reasoning model, so that the server, the trainer and the tests have something real to run. It
solves one- and two-step word problems in plain wording: having, buying, giving away, losing, groups of equal size,
sharing equally, prices. It does **not** solve GSM8K, and it knows nothing but such problems.

| | |
|---|---|
| backbone | Qwen2 architecture, {backbone_size:.1f}M parameters, {layers} layers, width {hidden}, {positions} positions, frozen |
| decoder | {decoder_size:.2f}M trained parameters, n = {n_latent}, T = {n_cycles}, N_sup = {n_supervision}, L = {n_layers}, keys and values from the context, gradient through the whole recursion |
| tokenizer | byte-level BPE, {vocab} tokens, digits one by one, ChatML |
| data | generated word problems (`training/synthetic.py`), for the backbone new ones in every batch{text} |
| training | backbone {pretrain_steps} steps, {pretrain_tokens:.0f}M tokens, {pretrain_minutes:.0f} minutes; decoder {train_steps} steps on {problems} problems; CPU, two threads and one |
| storage | bfloat16, {megabytes:.1f} MB of weights |

Greedy accuracy on held-out problems (number combinations and sentences that no training problem contains),
with 95 % intervals; effort 0 is the frozen backbone alone, {n_supervision} is the trained effort, more is extrapolation:

{tables}

Limits: whole numbers up to about a hundred in the question, one to four steps, wording close to the templates of the
generator. Unknown names and nouns are fine; unknown verbs are guesses. `make model` rebuilds everything from
nothing; `trm-eval --dataset synthetic:easy` repeats the measurement.
"""


def build(work: Path, text_file: Path | None, target: Path) -> None:
    """Train everything under `work`, then put the model, its report and its card into `target`."""
    backbone = work / "backbone"
    pretraining = PretrainSettings(output_dir=backbone, text_file=text_file, num_threads=2)
    if not _is_finished(backbone, pretraining.max_steps):
        pretrain(pretraining)
    shutil.rmtree(work / "decoder", ignore_errors=True)
    last = train(
        TrainSettings(
            dataset="synthetic:easy,all",  # easy problems twice as often
            num_problems=NUM_PROBLEMS,
            backbone=str(backbone),
            output_dir=work / "decoder",
            epochs=2,
            batch_size=64,
            n_latent=2,
            n_cycles=1,
            n_supervision=4,
            max_supervision=MAX_SUPERVISION,
            kv_source="context",
            gradient="full",
            optimizer="muon",
            lr=2e-3,
            num_threads=1,
        )
    )
    aside = checkpoint.make_aside(target)
    export(last, aside)
    reports = evaluate_bundle(aside)
    checkpoint.write_json(aside / "report.json", reports)
    shutil.copy(backbone / "pretrain.json", aside / "pretrain.json")
    (aside / "README.md").write_text(
        render_card(aside, reports, json.loads((work / "decoder" / "run.json").read_text()))
    )
    checkpoint.replace_directory(aside, target)


def export(source: Path, target: Path) -> None:
    """Copy a checkpoint into an existing directory for release: decoder in bfloat16, no training state."""
    model = TRMForCausalLM.from_pretrained(source)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.trained_state().items()}
    checkpoint.write_into(target, model.config, weights, model.backbone, checkpoint.read_tokenizer(source))


def evaluate_bundle(directory: Path) -> dict[str, Any]:
    """Reports of the model in `directory`, by the name of the data."""
    reports = {}
    for name, (dataset, limit) in EVALUATIONS.items():
        settings = EvalSettings(
            model=str(directory), dataset=dataset, effort=EFFORTS, limit=limit, max_tokens=128, baseline="backbone"
        )
        reports[name] = evaluate_model(settings) | {"model": "bundled"}
    return reports


def render_card(directory: Path, reports: dict[str, Any], run: dict[str, Any]) -> str:
    """The model card, filled in from the model, its reports and the records of its training."""
    model = TRMForCausalLM.from_pretrained(directory)
    config, record = model.config, _pretrain_record(directory)
    tables = "\n\n".join(_table(report) for report in reports.values())
    return CARD.format(
        backbone_size=sum(p.numel() for p in model.backbone.parameters()) / 1e6,
        layers=config.backbone_config.num_hidden_layers,
        hidden=config.hidden_size,
        positions=config.max_position_embeddings,
        decoder_size=sum(p.numel() for p in model.decoder.parameters()) / 1e6,
        n_latent=config.n_latent,
        n_cycles=config.n_cycles,
        n_supervision=config.n_supervision,
        n_layers=config.n_layers,
        vocab=config.vocab_size,
        text=", and GSM8K's training set as 2 % of the rows in the last two fifths of it"
        if record["settings"]["text_file"]
        else "",
        pretrain_steps=record["curve"][-1]["step"],
        pretrain_tokens=record["curve"][-1]["tokens"] / 1e6,
        pretrain_minutes=record["curve"][-1]["seconds"] / 60,
        train_steps=run["total_steps"],
        problems=run["num_examples"],
        megabytes=sum(file.stat().st_size for file in directory.rglob("*.safetensors")) / 1e6,
        tables=tables,
    )


def _table(report: dict[str, Any]) -> str:
    """Accuracy per effort in Markdown, each compared with effort 0 on the same problems."""
    lines = [
        f"`{report['dataset']}`, {report['n']} problems:\n",
        "| effort | accuracy | 95 % interval | gained, lost against effort 0 | p (exact McNemar, Holm) |",
        "|---|---|---|---|---|",
    ]
    for row in report["efforts"]:
        low, high = row["interval"]
        compared = f"+{row['wins']}, -{row['losses']} | {row['mcnemar_p']:.2g}" if row["effort"] else " | "
        lines.append(f"| {row['effort']} | {row['accuracy']:.1%} | {low:.1%} – {high:.1%} | {compared} |")
    return "\n".join(lines)


def _is_finished(backbone: Path, steps: int) -> bool:
    """Whether an earlier build got as far as the whole backbone."""
    return (backbone / "pretrain.json").is_file() and _pretrain_record(backbone)["curve"][-1]["step"] == steps


def _pretrain_record(directory: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((directory / "pretrain.json").read_text())
    return record


def main() -> None:
    """Entry point of `make model`."""
    parser = argparse.ArgumentParser(description="Rebuild the bundled model from nothing.")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/bundled"))
    parser.add_argument("--text-file", type=Path, help="GSM8K's training set, where it is at hand")
    arguments = parser.parse_args()
    configure_logging()
    text_file = arguments.text_file
    build(arguments.work_dir, text_file, bundled_model_path())


if __name__ == "__main__":
    main()
