"""Rebuild the bundled model: decoder, evaluation and model card, on the backbone that ships or on a new one.

`make model` runs this, `make model BACKBONE=new` with tokenizer and backbone before it, and `make controls` trains what
the card compares the model with. The recipe is the code below; what it measured stands in the card and in `report.json`
beside the weights. An interrupted build goes on where its last checkpoint was written. The processes that torchrun
starts train together; the first one does the rest.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch

from training import checkpoints, workers
from training.config import EvalSettings, PretrainSettings, TrainSettings
from training.directories import claim
from training.evaluation.report import show_p
from training.evaluation.run import evaluate_model
from training.pretrain import FREE_ON_RESUME, PRETRAIN_JSON, pretrain
from training.research.controls import CONTROL_JSON, NAMES, Kind, train_control
from training.run import train
from trm import TRMForCausalLM, bundled_model_path, checkpoint, extra
from trm.errors import ConfigError
from trm.logs import configure_logging
from trm.settings import run_command

DECODER: dict[str, Any] = {
    "dataset": "synthetic:easy,all,mental*171",  # nine in ten are asked for the answer alone
    "num_problems": 448_000,
    "batch_size": 64,
    "n_latent": 2,
    "n_cycles": 1,
    "n_supervision": 6,
    "min_supervision": 3,
    "max_supervision": 16,
    "context_layers": [0, 2, 4],
    "step_targets": True,
    "optimizer": "muon",
    "lr": 6e-3,
    "device": "cpu",
    "num_threads": 1,
}
DEEPER: dict[str, Any] = DECODER | {  # what is right must stay right at any depth
    "dataset": "synthetic:easy,all,mental*114",
    "num_problems": 96_000,
    "seed": 1,
    "skip_supervision": 10,
    "lr": 1e-3,
}
RUNS = {"decoder": DECODER, "deeper": DEEPER}  # the second begins with what the first reached
AT_ONCE = "at once"
EVALUATIONS = {
    AT_ONCE: ("synthetic:mental", 3000, [0, 1, 2, 3, 4, 6, 8, 12]),
    "worked": ("synthetic", 3000, [0, 1, 6, 12]),
    "easy": ("synthetic:easy", 1000, [0, 6]),
}
GSM8K = ("GSM8K, validation", 500, [0, 6])
COMPARED = (AT_ONCE, "worked")  # with the controls
MAX_TOKENS = 256
PICTURES = ("accuracy.png", "operations.png", "halting.png")  # of the answers at once
REPORT = "report.json"
RECORD = "training.json"  # how long each run of the decoder was
NO_STEP_TARGETS = "no-step-targets"
CONTROLS = NAMES | {NO_STEP_TARGETS: "the same recursion, the answer at every step"}

# ruff: noqa: E501 - table rows of the card stay on one line
CARD = r"""# The bundled model

A small recursive reasoning model, so that the server, the trainer and the tests have something real to run. It
solves word problems of one to four operations in plain wording: having, buying, giving away, losing, groups of equal
size, sharing equally, prices. It writes its work down, or answers at once and does one operation in each supervision
step. It does **not** solve GSM8K, and it knows nothing but such problems.

| | |
|---|---|
| backbone | Qwen2 architecture, {backbone_size:.1f}M parameters, {layers} layers, width {hidden}, {positions} positions, frozen |
| decoder | {decoder_size:.2f}M trained parameters, n = {n_latent}, T = {n_cycles}, N_sup = {n_supervision}, L = {n_layers}, keys and values from a mix of backbone layers {context_layers}, gradient through the whole recursion, a target for each supervision step |
| tokenizer | byte-level BPE, {vocab} tokens, digits one by one, ChatML |
| data | generated word problems (`training/problems/synthetic.py`), new ones in every batch; for the backbone{text} |
| training | backbone {pretrain_steps} steps, {pretrain_tokens:.0f}M tokens, {pretrain_minutes:.0f} minutes; decoder {train_steps} steps on {problems} problems, nine in ten answered at once, depths from {min_supervision} to {n_supervision}, {train_minutes:.0f} minutes, then {deeper_steps} on {deeper_problems} more, half of them behind 1 to {skipped} steps without gradient, {deeper_minutes:.0f} minutes; by the clock, on two cores |
| storage | bfloat16, {megabytes:.1f} MB of weights |

Greedy accuracy on held-out problems (number combinations and sentences that no training problem contains),
with 95 % intervals; effort 0 is the frozen backbone alone, {n_supervision} is the trained effort, more is extrapolation.
Gained and lost are problems that only the effort, or only the backbone, got right; p is the exact McNemar test,
corrected for the number of comparisons (Holm).{about_controls}

## Answers at once

{at_once}

![Accuracy by effort, beside what it is compared with](accuracy.png)

![Accuracy by operations and effort](operations.png)

A problem of k operations needs k supervision steps: each step of the recursion does one.

## Worked answers

{worked}

## What halting costs, and how the backbone grew

Of the answers at once:

![What halting would cost](halting.png)

The backbone's own curve, on 300 held-out problems of each kind while it was trained:

{curve}

Limits: whole numbers up to about a hundred in the question, one to four operations, wording close to the templates of
the generator. Unknown names and nouns are fine; unknown verbs are guesses.
`{command}` repeats the first
table. `make model` trains the decoder anew, on the backbone that ships, and writes this card again: the same within
the intervals. `make controls` adds the controls. `make model BACKBONE=new` grows a backbone first, from nothing. The
card can then come out differently: two backbones solved worked problems equally well, but answering at once the decoder
on one of them was 3 points better. The table of GSM8K, and a new backbone's text from it, need `GSM8K=DIR`, a directory
with GSM8K's training rows: `train.jsonl`, and those that nothing is trained on in `validation.jsonl`.
"""

ABOUT_CONTROLS = """

The controls (`make controls`) were trained on the decoder's examples in the decoder's order, nine in ten of them
answered at once, for at least its floating-point operations: all weights of the backbone; one ordinary layer more; LoRA
with as many weights as the decoder; and the same recursion without a target for each step, for the same number of
steps. There, gained and lost are the problems that only effort {n_supervision}, or only the control, got right."""


def build(work: Path, text_file: Path | None, gsm8k: Path | None, target: Path, backbone: Path | None = None) -> None:
    """Train everything under `work`, then put the model, its reports and its card into `target`.

    `backbone` is one that `trm-pretrain` made, or a bundled model with one, in the place of a new one.
    """
    for library in ("matplotlib", "tensorboard"):
        extra.require(library, "the bundled model's recipe")

    if backbone is None:
        backbone = _grown(work, text_file)
    elif not _is_whole(backbone):
        raise ConfigError(f"--backbone {backbone}: no finished run's {PRETRAIN_JSON} there; give one of trm-pretrain")
    work = _on(work, "model", backbone)
    last = train_decoder(backbone, work)
    if workers.rank() > 0:
        return

    aside = checkpoint.make_aside(target)
    export(last, aside)
    shutil.copy(backbone / PRETRAIN_JSON, aside)
    runs = {name: checkpoint.read_json(work / name / checkpoints.RUN_JSON) for name in RUNS}
    counted = {"steps": "total_steps", "problems": "num_examples", "seconds": "wall_s"}
    record = {name: {key: run[field] for key, field in counted.items()} for name, run in runs.items()}
    checkpoint.write_json(aside / RECORD, record)
    data = EVALUATIONS | ({"gsm8k": (str(gsm8k), *GSM8K[1:])} if gsm8k else {})
    checkpoint.write_json(aside / REPORT, {name: evaluate(aside, name, work / "reports", *data[name]) for name in data})
    illustrate(aside, work / "reports")
    checkpoint.replace_directory(aside, target)


def compare(work: Path, target: Path) -> None:
    """Train the controls of the model in `target`, then put what they reach into its report and its card."""
    work = _on(work, "controls", target)
    runs = [TrainSettings(**run, backbone=str(target)) for run in RUNS.values()]
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        if not (work / kind / CONTROL_JSON).exists():
            train_control(kind, runs, work / kind)
    last = train_decoder(target, work, step_targets=False)
    if workers.rank() > 0:
        return
    recursive = work / NO_STEP_TARGETS
    if not recursive.exists():
        aside = checkpoint.make_aside(recursive)
        export(last, aside)
        checkpoint.write_json(aside / CONTROL_JSON, {"name": CONTROLS[NO_STEP_TARGETS], "compute": "the decoder's own"})
        checkpoint.replace_directory(aside, recursive)

    reports = checkpoint.read_json(target / REPORT)
    for name in COMPARED:
        reports[name] = evaluate(
            target, name, work / "reports", *EVALUATIONS[name], [*(work / kind for kind in kinds), recursive]
        )
    checkpoint.write_json(target / REPORT, reports)
    illustrate(target, work / "reports")


def train_decoder(backbone: Path, work: Path, **changes: Any) -> Path:
    """The last checkpoint of a decoder trained by the recipe, with `changes`, in directories of `work`."""
    first, second = RUNS
    last = finish(TrainSettings(**RUNS[first] | changes, backbone=str(backbone), output_dir=work / first))
    return finish(TrainSettings(**RUNS[second] | changes, init_from=last, output_dir=work / second))


def finish(settings: TrainSettings) -> Path:
    """The last checkpoint of a run: begun now, carried on, or there already.

    Raises SystemExit where a signal has stopped the run: nothing may be built on half of one.
    """
    run_dir = settings.output_dir
    last = workers.agree(checkpoints.find(run_dir) if checkpoints.checkpoints(run_dir) else None)
    if last is None:
        last = train(settings)
    elif not _is_last(last):
        last = train(TrainSettings(resume=run_dir))
    workers.wait()  # the first process writes
    if not _is_last(last):
        sys.exit(f"{run_dir} was stopped; the same command goes on")
    return last


def _is_last(path: Path) -> bool:
    """Whether a run ends with this checkpoint."""
    total = checkpoint.read_json(path.parent / checkpoints.RUN_JSON)["total_steps"]
    return bool(checkpoints.step_of(path) == total)


def export(source: Path, target: Path) -> None:
    """Copy a checkpoint into an existing directory for release: decoder in bfloat16, no training state."""
    model = TRMForCausalLM.from_pretrained(source)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.trained_state().items()}
    checkpoint.write_into(target, model.config, weights, model.backbone, checkpoint.read_tokenizer(source))


def evaluate(
    model: Path, name: str, reports: Path, dataset: str, limit: int, efforts: list[int], controls: Sequence[Path] = ()
) -> dict[str, Any]:
    """The report on one kind of data, without the paths of this machine; it lies in a directory of `reports`, too."""
    settings = EvalSettings(
        model=str(model),
        dataset=dataset,
        effort=efforts,
        limit=limit,
        max_tokens=MAX_TOKENS,
        baseline="backbone",
        control=list(map(str, controls)),
        report=reports / name,
        num_threads=DECODER["num_threads"],
    )
    return evaluate_model(settings) | {"model": "bundled", "dataset": GSM8K[0] if name == "gsm8k" else dataset}


def illustrate(directory: Path, reports: Path) -> None:
    """Draw the pictures of the model in `directory` and write its card, from its report and the records of training."""
    from training.evaluation.pictures import draw

    report = checkpoint.read_json(directory / REPORT)
    draw(reports, report[AT_ONCE])  # anew, under the model's own name
    for picture in PICTURES:
        shutil.copy(reports / picture, directory)
    (directory / "README.md").write_text(render_card(directory, report))


def render_card(directory: Path, reports: dict[str, Any]) -> str:
    """The model card, filled in from the model, its reports and the records of its training."""
    model = TRMForCausalLM.from_pretrained(directory)
    config = model.config
    grown, runs = checkpoint.read_json(directory / PRETRAIN_JSON), checkpoint.read_json(directory / RECORD)
    trained, deeper = (runs[name] for name in RUNS)
    at_once = reports[AT_ONCE]
    efforts = " ".join(str(row["effort"]) for row in at_once["efforts"])
    compared = ABOUT_CONTROLS.format(n_supervision=config.n_supervision) if "controls" in at_once else ""
    return CARD.format(
        backbone_size=sum(p.numel() for p in model.backbone.parameters()) / 1e6,
        layers=config.backbone_config.num_hidden_layers,
        hidden=config.hidden_size,
        positions=config.max_position_embeddings,
        decoder_size=sum(p.numel() for p in model.decoder.parameters()) / 1e6,
        n_latent=config.n_latent,
        n_cycles=config.n_cycles,
        n_supervision=config.n_supervision,
        min_supervision=DECODER["min_supervision"],
        n_layers=config.n_layers,
        context_layers=", ".join(map(str, config.state_layers)),
        vocab=config.vocab_size,
        text=", GSM8K's training rows, but not those of its table, as 2 % of all in the last two fifths"
        if grown["settings"]["text_file"]
        else " too",
        pretrain_steps=grown["curve"][-1]["step"],
        pretrain_tokens=grown["curve"][-1]["tokens"] / 1e6,
        pretrain_minutes=grown["curve"][-1]["seconds"] / 60,
        train_steps=trained["steps"],
        train_minutes=trained["seconds"] / 60,
        problems=trained["problems"],
        deeper_steps=deeper["steps"],
        deeper_minutes=deeper["seconds"] / 60,
        deeper_problems=deeper["problems"],
        skipped=DEEPER["skip_supervision"],
        megabytes=sum(file.stat().st_size for file in directory.rglob("*.safetensors")) / 1e6,
        about_controls=compared,
        at_once=_table(at_once) + "\n\n" + _operations(at_once),
        worked="\n\n".join(_table(report) for name, report in reports.items() if name != AT_ONCE),
        command=f"trm-eval --dataset {at_once['dataset']} --limit {at_once['n']} --effort {efforts} --baseline backbone",
        curve=_curve(grown["curve"]),
    )


def _table(report: dict[str, Any]) -> str:
    """Accuracy per effort and of the controls in Markdown."""
    lines = [
        f"`{report['dataset']}`, {report['n']} problems:\n",
        "| | accuracy | 95 % interval | gained, lost | p |",
        "|---|---|---|---|---|",
    ]
    rows = [(f"effort {row['effort']}", row) for row in report["efforts"]]
    rows += [(f"{CONTROLS[row['name']]} (control)", row) for row in report.get("controls", [])]
    for label, row in rows:
        low, high = row["interval"]
        compared = "" if label == "effort 0" else f"+{row['wins']}, -{row['losses']}"
        p = "" if label == "effort 0" else show_p(row["mcnemar_p"])
        lines.append(f"| {label} | {row['accuracy']:.1%} | {low:.1%} – {high:.1%} | {compared} | {p} |")
    return "\n".join(lines)


def _operations(report: dict[str, Any]) -> str:
    """Accuracy by the number of operations, per effort and of the controls, in Markdown."""
    groups = report["operations"]
    heads = [f"{group['operations']} ({group['n']})" for group in groups]
    lines = [f"| right, by operations (problems) | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    labels = [f"effort {row['effort']}" for row in groups[0]["efforts"]]
    labels += [f"{CONTROLS[row['name']]} (control)" for row in groups[0]["controls"]]
    for label, *rows in zip(labels, *([*group["efforts"], *group["controls"]] for group in groups), strict=True):
        cells = " | ".join(f"{row['accuracy']:.1%}" for row in rows)
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)


def _curve(points: list[dict[str, Any]]) -> str:
    groups = [name for name in points[0] if name not in ("step", "tokens", "seconds", "loss")]
    lines = [f"| tokens | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    lines += [f"| {p['tokens'] / 1e6:.1f}M | {' | '.join(f'{p[name]:.1%}' for name in groups)} |" for p in points]
    return "\n".join(lines)


def _grown(work: Path, text_file: Path | None) -> Path:
    """The backbone of the recipe: grown now, carried on, or there already."""
    settings = PretrainSettings(text_file=text_file, device="cpu", num_threads=1)
    try:
        text = text_file and hashlib.sha256(text_file.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"--text-file {text_file}: cannot be read: {error.strerror}") from error
    directory = _place(work, "backbone", settings.model_dump(mode="json", exclude=FREE_ON_RESUME), text)
    if not _is_whole(directory):
        pretrain(settings.model_copy(update={"output_dir": directory}))
    return directory


def _is_whole(backbone: Path) -> bool:
    """Whether its record says that it was trained to the end."""
    if not (backbone / PRETRAIN_JSON).is_file():
        return False
    record = checkpoint.read_json(backbone / PRETRAIN_JSON)
    return bool(record["curve"][-1]["step"] == record["settings"]["max_steps"])


def _on(work: Path, kind: str, backbone: Path) -> Path:
    """The directory of what the recipe's runs make on a backbone."""
    return _place(work, kind, checkpoint.fingerprint(checkpoint.read_backbone(backbone)), RUNS)


def _place(work: Path, kind: str, *made_from: Any) -> Path:
    """A directory of `work` for what is made from this: another recipe or backbone has another one, so none are mixed."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return work / f"{kind}-{digest[:8]}"


def main() -> None:
    """Entry point of `make model` and `make controls`."""
    parser = argparse.ArgumentParser(
        "python -m training.research.bundle",
        description="Rebuild the bundled model, from nothing or on a backbone, or the controls of its card.",
    )
    parser.add_argument(
        "--work-dir", type=Path, default=Path("runs/bundled"), help="where all steps are kept; a second run goes on"
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--text-file", type=Path, help="GSM8K's training set, if you have it, for the backbone's wording"
    )
    begin.add_argument("--backbone", type=Path, help="grow none, take this one of trm-pretrain; trm/bundled has one")
    parser.add_argument("--gsm8k-validation", type=Path, help="GSM8K rows to evaluate on, if you have them")
    parser.add_argument(
        "--controls", action="store_true", help="train the bundled model's controls, and enter them in its card"
    )
    arguments = parser.parse_args()
    if arguments.controls and (arguments.text_file or arguments.backbone or arguments.gsm8k_validation):
        parser.error("--controls belong to the model that is there: it goes with --work-dir only")

    def command() -> None:
        configure_logging(workers.log_level())
        workers.start("cpu")
        work, target = arguments.work_dir, bundled_model_path()
        with claim(work, parser.prog, "--work-dir") if workers.rank() == 0 else nullcontext():
            if arguments.controls:
                compare(work, target)
            else:
                build(work, arguments.text_file, arguments.gsm8k_validation, target, arguments.backbone)
        workers.leave()

    run_command(command, parser.prog)


if __name__ == "__main__":
    main()
