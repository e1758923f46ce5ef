"""Rebuild the bundled model from nothing: tokenizer, backbone, decoder, control, evaluation, model card.

`make model` runs this. The recipe is the code below; what it measured stands in the card and in `report.json` beside
the weights. A stage that an interrupted build has finished is not done again.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from training import checkpoints
from training.config import EvalSettings, PretrainSettings, TrainSettings
from training.evaluation.run import CONTROL_DIR, evaluate_model
from training.pretrain import pretrain
from training.research.controls import CONTROL_JSON, ControlSettings, train_control
from training.run import train
from trm import TRMForCausalLM, bundled_model_path, checkpoint, extra
from trm.logs import configure_logging

DECODER: dict[str, Any] = {
    "dataset": "synthetic:easy,all",  # easy problems twice as often
    "num_problems": 38_400,
    "batch_size": 64,
    "n_latent": 2,
    "n_cycles": 1,
    "n_supervision": 4,
    "max_supervision": 16,
    "kv_source": "context",
    "gradient": "full",
    "optimizer": "muon",
    "lr": 2e-3,
}
EVALUATIONS = {"all": ("synthetic", 3000, [0, 1, 2, 4, 8, 16]), "easy": ("synthetic:easy", 1000, [0, 4])}
MAX_TOKENS = 256
PICTURES = ("accuracy.png", "halting.png")

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
| data | generated word problems (`training/problems/synthetic.py`), new ones in every batch; for the backbone{text} |
| training | backbone {pretrain_steps} steps, {pretrain_tokens:.0f}M tokens, {pretrain_minutes:.0f} minutes; decoder {train_steps} steps on {problems} problems; CPU, two threads and one |
| storage | bfloat16, {megabytes:.1f} MB of weights |

Greedy accuracy on held-out problems (number combinations and sentences that no training problem contains),
with 95 % intervals; effort 0 is the frozen backbone alone, {n_supervision} is the trained effort, more is extrapolation.
Gained and lost are problems that only the effort, or only the backbone, got right; p is the exact McNemar test, corrected
for the number of efforts (Holm). The control is the same backbone trained on, on the decoder's problems in the decoder's order,
with all its weights and at least the decoder's floating-point operations ({control_tflop:.0f} TFLOP in {control_steps} steps; the decoder took {decoder_tflop:.0f}
in {train_steps}); there, gained and lost are the problems that only effort {n_supervision}, or only the control, got right.

{tables}

![Accuracy against effort](accuracy.png)

![What halting would cost](halting.png)

The backbone's own curve, on 300 held-out problems of each kind while it was trained:

{curve}

Limits: whole numbers up to about a hundred in the question, one to four steps, wording close to the templates of the
generator. Unknown names and nouns are fine; unknown verbs are guesses. `make model` rebuilds everything from
nothing; `trm-eval --dataset synthetic --limit 3000 --effort 0 1 2 4 8 16 --max-tokens 256 --baseline backbone` repeats the first table, with
the control that lies in `control/`.
"""


def build(work: Path, text_file: Path | None, gsm8k: Path | None, target: Path) -> None:
    """Train everything under `work`, then put the model, its control, its reports and its card into `target`."""
    for library in ("matplotlib", "tensorboard"):
        extra.require(library, "the bundled model's recipe")
    from training.evaluation.pictures import draw

    backbone, decoder = work / "backbone", work / "decoder"
    pretraining = PretrainSettings(output_dir=backbone, text_file=text_file, num_threads=2)
    if not _is_finished(backbone, pretraining.max_steps):
        pretrain(pretraining)
    settings = TrainSettings(**DECODER, backbone=str(backbone), output_dir=decoder, num_threads=1)
    last = _last(decoder) or train(settings)
    control = work / CONTROL_DIR
    if not (control / CONTROL_JSON).exists():
        train_control(ControlSettings(kind="continued", run=decoder, output_dir=control, num_threads=1))

    aside = checkpoint.make_aside(target)
    export(last, aside)
    shutil.copytree(control, aside / CONTROL_DIR)
    reports = evaluate_bundle(aside, work, gsm8k)
    checkpoint.write_json(aside / "report.json", reports)
    draw(work / "reports", reports["all"])  # anew, under the model's own name
    for picture in PICTURES:
        shutil.copy(work / "reports" / picture, aside)
    shutil.copy(backbone / "pretrain.json", aside)
    (aside / "README.md").write_text(render_card(aside, work, reports))
    checkpoint.replace_directory(aside, target)


def export(source: Path, target: Path) -> None:
    """Copy a checkpoint into an existing directory for release: decoder in bfloat16, no training state."""
    model = TRMForCausalLM.from_pretrained(source)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.trained_state().items()}
    checkpoint.write_into(target, model.config, weights, model.backbone, checkpoint.read_tokenizer(source))


def evaluate_bundle(directory: Path, work: Path, gsm8k: Path | None) -> dict[str, Any]:
    """Reports of the model in `directory`, by the name of the data; GSM8K's validation rows where they are at hand."""
    data = EVALUATIONS | ({"gsm8k": (str(gsm8k), 500, [0, 4])} if gsm8k else {})
    reports = {}
    for name, (dataset, limit, efforts) in data.items():
        settings = EvalSettings(
            model=str(directory),
            dataset=dataset,
            effort=efforts,
            limit=limit,
            max_tokens=MAX_TOKENS,
            baseline="backbone",
            report=work / "reports" if name == "all" else None,
        )
        report = evaluate_model(settings)
        reports[name] = report | {"model": "bundled", "dataset": "GSM8K, validation" if name == "gsm8k" else dataset}
    return reports


def render_card(directory: Path, work: Path, reports: dict[str, Any]) -> str:
    """The model card, filled in from the model, its reports and the records of its training."""
    model = TRMForCausalLM.from_pretrained(directory)
    config, record = model.config, _pretrain_record(directory)
    run = checkpoint.read_json(work / "decoder" / "run.json")
    control = checkpoint.read_json(directory / CONTROL_DIR / CONTROL_JSON)
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
        text=", GSM8K's training set as 2 % of the rows in the last two fifths"
        if record["settings"]["text_file"]
        else " too",
        pretrain_steps=record["curve"][-1]["step"],
        pretrain_tokens=record["curve"][-1]["tokens"] / 1e6,
        pretrain_minutes=record["curve"][-1]["seconds"] / 60,
        train_steps=run["total_steps"],
        problems=run["num_examples"],
        megabytes=sum(file.stat().st_size for file in directory.rglob("*.safetensors")) / 1e6,
        tables="\n\n".join(_table(report) for report in reports.values()),
        control_tflop=control["tflop"],
        decoder_tflop=control["decoder_tflop"],
        control_steps=control["steps"],
        curve=_curve(record["curve"]),
    )


def _table(report: dict[str, Any]) -> str:
    """Accuracy per effort and of the control in Markdown."""
    lines = [
        f"`{report['dataset']}`, {report['n']} problems:\n",
        "| | accuracy | 95 % interval | gained, lost | p |",
        "|---|---|---|---|---|",
    ]
    rows = [(f"effort {row['effort']}", row) for row in report["efforts"]]
    rows.append(("backbone trained on (control)", report["control"]))
    for label, row in rows:
        low, high = row["interval"]
        compared = "" if label == "effort 0" else f"+{row['wins']}, -{row['losses']}"
        p = "" if label == "effort 0" else f"{row['mcnemar_p']:.2g}"
        lines.append(f"| {label} | {row['accuracy']:.1%} | {low:.1%} – {high:.1%} | {compared} | {p} |")
    return "\n".join(lines)


def _curve(points: list[dict[str, Any]]) -> str:
    groups = [name for name in points[0] if name not in ("step", "tokens", "seconds", "loss")]
    lines = [f"| tokens | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    lines += [f"| {p['tokens'] / 1e6:.1f}M | {' | '.join(f'{p[name]:.1%}' for name in groups)} |" for p in points]
    return "\n".join(lines)


def _last(run_dir: Path) -> Path | None:
    """The last checkpoint of a run that is finished; one that was cut is carried to its end. None for no run."""
    if not checkpoints.checkpoints(run_dir):
        return None
    newest = checkpoints.find(run_dir)
    if checkpoints.step_of(newest) == checkpoint.read_json(run_dir / "run.json")["total_steps"]:
        return newest
    return train(TrainSettings(resume=run_dir))


def _is_finished(backbone: Path, steps: int) -> bool:
    """Whether an earlier build got as far as the whole backbone."""
    return (backbone / "pretrain.json").is_file() and _pretrain_record(backbone)["curve"][-1]["step"] == steps


def _pretrain_record(directory: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((directory / "pretrain.json").read_text())
    return record


def main() -> None:
    """Entry point of `make model`."""
    parser = argparse.ArgumentParser(description="Rebuild the bundled model from nothing.")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("runs/bundled"), help="where all steps are kept; a second run goes on"
    )
    parser.add_argument("--text-file", type=Path, help="GSM8K's training set, if you have it")
    parser.add_argument("--gsm8k-validation", type=Path, help="GSM8K rows to evaluate on, if you have them")
    arguments = parser.parse_args()
    configure_logging()
    build(arguments.work_dir, arguments.text_file, arguments.gsm8k_validation, bundled_model_path())


if __name__ == "__main__":
    main()
