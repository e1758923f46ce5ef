"""The training loop: what it updates, what it counts, and that a run can be cut and continued anywhere."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import BACKBONES, make_backbone
from tests.training.comparing import differing_tensors
from training.batches import collate
from training.checkpoints import STATE_JSON, STATE_TENSORS
from training.config import TrainSettings
from training.loss import TokenLosses, full_steps, token_losses
from training.optim import EMA, learning_rate_scale, make_optimizers
from training.problems.data import encode_problems, load_problems
from training.run import train
from training.trainer import Trainer
from trm import TRMForCausalLM, checkpoint
from trm.chat import ChatFormat
from trm.errors import CheckpointError, ConfigError, DeviceError

Settings = Callable[..., TrainSettings]

GRADIENTS = ("full", "paper")


def make_trainer(settings: TrainSettings) -> Trainer:
    chat = ChatFormat(checkpoint.read_tokenizer(str(settings.backbone)))
    problems = load_problems(str(settings.dataset), split="train", seed=0, num_problems=settings.num_problems)
    backbone = checkpoint.read_backbone(str(settings.backbone))
    torch.manual_seed(settings.seed)
    names = ("n_latent", "n_cycles", "n_supervision", "n_layers", "kv_source", "context_layers")
    depth = {name: getattr(settings, name) for name in names}
    model = TRMForCausalLM.from_backbone(backbone, own_lm_head=settings.train_lm_head, **depth)
    examples = encode_problems(problems, chat, settings.max_length, settings.replies, settings.step_targets)
    return Trainer(settings, model, chat, examples, "cpu")


def write_down(jsonl: Callable[..., Path], *rows: list[str]) -> str:
    """A file with a problem for each list of results."""
    return str(jsonl(*({"question": f"{n}?", "answer": f"#### {r[-1]}", "steps": r} for n, r in enumerate(rows))))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kv_source", ["context", "state"])
def test_after_one_step_every_trainable_tensor_has_a_gradient(
    settings: Settings, gradient: str, kv_source: str
) -> None:
    # Zero-initialised projections hide the weights behind them from the first step only.
    trainer = make_trainer(settings(gradient=gradient, kv_source=kv_source, train_lm_head=True))
    trainer.train_step()
    seen: dict[str, float] = {}
    for optimizer in trainer.weights.optimizers:
        optimizer.register_step_pre_hook(
            lambda *_: seen.update({n: float(p.grad.abs().max()) for n, p in trainer.weights.parameters.items()})
        )

    trainer.train_step()

    assert set(seen) == {n for n, _ in trainer.model.named_parameters() if not n.startswith("backbone.")}
    assert [name for name, size in seen.items() if size == 0] == []


def test_the_backbone_never_moves(settings: Settings) -> None:
    trainer = make_trainer(settings())
    before = {name: tensor.clone() for name, tensor in trainer.model.backbone.state_dict().items()}

    for _ in range(3):
        trainer.train_step()

    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.backbone.state_dict().items())


@pytest.mark.parametrize("family", BACKBONES)
def test_a_run_stands_on_any_family(settings: Settings, tmp_path: Path, tokenizer: Any, family: str) -> None:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    theirs = make_backbone(family, vocab_size=len(tokenizer), max_position_embeddings=1024, **ends)
    theirs.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")

    last = train(settings(backbone=str(tmp_path / "backbone"), max_steps=2))

    model, ids = TRMForCausalLM.from_pretrained(last), torch.arange(3, 40)[None]
    assert model.config.backbone_config.model_type == family
    torch.testing.assert_close(model(ids, n_supervision=0).logits, theirs(ids).logits, atol=1e-3, rtol=1e-4)
    assert (model(ids).logits - theirs(ids).logits).abs().max() > 1e-2, "it has learned something"


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(settings: Settings, gradient: str, optimizer: str) -> None:
    trainer = make_trainer(settings(gradient=gradient, optimizer=optimizer, num_problems=8, batch_size=8, epochs=20))
    losses = [trainer.train_step()["loss"] for _ in range(18)]

    assert losses[-1] < 0.9 * losses[0]


def test_masters_average_and_optimiser_are_float32_and_move(settings: Settings) -> None:
    # In bfloat16 an average with decay 0.999 never moved.
    trainer = make_trainer(settings(autocast="on"))
    start = {name: tensor.clone() for name, tensor in trainer.weights.ema.average.items()}
    for _ in range(3):
        trainer.train_step()

    tensors = [*trainer.weights.parameters.values(), *trainer.weights.ema.average.values()]
    states = [t for o in trainer.weights.optimizers for s in o.state.values() for t in s.values() if t.ndim]
    assert {t.dtype for t in [*tensors, *states]} == {torch.float32}
    moved = {name for name, tensor in trainer.weights.ema.average.items() if not torch.equal(tensor, start[name])}
    assert moved == set(trainer.weights.parameters)
    assert any(not torch.equal(trainer.weights.ema.average[n], p) for n, p in trainer.weights.parameters.items())


def test_the_average_follows_its_formula() -> None:
    parameter = torch.nn.Parameter(torch.tensor([0.0]))
    ema = EMA({"p": parameter})
    expected = 0.0
    for step in range(1, 2000):
        parameter.data.fill_(float(step))
        ema.update(step)
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step

    assert float(ema.average["p"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("gradient", "accumulation", "steps"), [("full", 1, 12), ("paper", 1, 36), ("full", 4, 4), ("paper", 4, 12)]
)
def test_the_schedule_counts_optimiser_steps_really_taken(
    settings: Settings, gradient: str, accumulation: int, steps: int
) -> None:
    # 24 problems in batches of 4, two epochs: 12 batches. The ancestor forgot N_sup and decayed 16 times too fast.
    trainer = make_trainer(settings(gradient=gradient, gradient_accumulation=accumulation, epochs=2, warmup_steps=2))
    assert trainer.total_steps == steps
    rates = []
    for _ in range(steps):
        trainer.train_step()
        rates.append(trainer.weights.optimizers[0].param_groups[0]["lr"] / 1e-2)

    assert rates[0] == pytest.approx(0.5)  # warm-up is used
    assert max(rates) == 1.0
    assert rates == pytest.approx([learning_rate_scale(step, steps, 2) for step in range(steps)])
    assert rates[-1] == min(rates[2:]) <= 0.5


@pytest.mark.parametrize("step_targets", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_accumulated_batches_give_the_updates_of_one_large_batch(
    settings: Settings, jsonl: Callable[..., Path], gradient: str, step_targets: bool
) -> None:
    # With "paper" every batch of the group does a supervision step before any weight moves.
    same: dict[str, Any] = {"num_problems": 4, "epochs": 9, "autocast": "off", "gradient": gradient}
    if step_targets:  # the batches differ in how many labels a step has, and in how many steps differ
        path = write_down(jsonl, ["5"], ["7", "100"], ["12", "3", "40"], ["1", "20", "3", "400"])
        same |= {"dataset": path, "replies": ["answer"], "step_targets": True}

    def reports(**changes: int) -> list[tuple[float, float]]:
        trainer = make_trainer(settings(**same, **changes))
        return [(report["loss"], report["grad_norm"]) for report in (trainer.train_step() for _ in range(4))]

    large, small = reports(batch_size=4), reports(batch_size=2, gradient_accumulation=2)

    assert small == [pytest.approx(pair, rel=2e-3) for pair in large]


def test_the_depth_of_a_batch_is_drawn_between_its_bounds(settings: Settings) -> None:
    trainer = make_trainer(settings(min_supervision=2, n_supervision=4, max_steps=6))

    depths = [len(trainer.train_step()["losses"]) for _ in range(6)]

    assert set(depths) == {2, 3, 4}


def test_half_of_the_batches_begin_behind_skipped_steps(settings: Settings, tmp_path: Path) -> None:
    last = train(settings(skip_supervision=3, n_supervision=2, epochs=5))

    trainer, firsts = make_trainer(settings(skip_supervision=3)), []
    for step in range(400):
        numbers = trainer.supervision_steps(step)
        assert len(numbers) == 3
        firsts.append(numbers.start)
    assert set(firsts) == {0, 1, 2, 3}
    assert 150 < firsts.count(0) < 250
    lines = [json.loads(line) for line in (last.parent / "log.jsonl").read_text().splitlines()]
    losses = [line["losses"] for line in lines if "losses" in line]
    assert {len(each) for each in losses} == {5}
    assert all(any(each[step] is not None for each in losses) for step in range(5))


@pytest.mark.parametrize("autocast", ["on", "off"])
def test_skipped_steps_are_the_same_steps_without_gradient(settings: Settings, autocast: str) -> None:
    trainer = make_trainer(settings(autocast=autocast))
    for _ in range(3):
        trainer.train_step()
    trainer.feed.fetch(3)
    model, prepared = trainer.model, trainer.feed.prepared[0]

    def gradients(losses: Sequence[TokenLosses]) -> dict[str, torch.Tensor]:
        torch.stack([each.cross_entropy for each in losses]).sum().backward()
        return {name: p.grad.clone() for name, p in model.decoder.named_parameters() if p.grad is not None}

    with trainer._autocast():
        key_values = prepared.key_values(model)
        with torch.no_grad():
            y = z = torch.zeros_like(prepared.x)
            for _ in range(2):
                y, z = model.decoder.step(prepared.x, y, z, prepared.query_rope, key_values)
        expected = []
        for number in (2, 3):
            y, z = model.decoder.step(prepared.x, y, z, prepared.query_rope, key_values)
            expected.append(token_losses(model, y, prepared, number))
        wanted = gradients(expected)
        model.zero_grad()
        losses = list(full_steps(model, prepared, range(2, 4)))
        found = gradients(losses)
        whole = list(full_steps(model, prepared, range(4)))

    assert all(torch.equal(a.cross_entropy, b.cross_entropy) for a, b in zip(losses, whole[2:], strict=True))
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_step_weights_scale_the_losses_of_the_steps(settings: Settings) -> None:
    reports = {}
    for kind in ("uniform", "linear", "last"):
        trainer = make_trainer(settings(step_weights=kind))
        for _ in range(2):  # at the first the steps are equal
            reports[kind] = trainer.train_step()

    for kind, weights in {"uniform": (1 / 3, 1 / 3, 1 / 3), "linear": (1 / 6, 2 / 6, 3 / 6), "last": (0, 0, 1)}.items():
        losses = reports[kind]["losses"]
        assert reports[kind]["loss"] == pytest.approx(
            sum(w * v for w, v in zip(weights, losses, strict=True)), abs=1e-4
        )
    assert len({report["grad_norm"] for report in reports.values()}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_supervision": 4}, "--min-supervision 4: must be at most --n-supervision 3"),
        ({"min_supervision": 2, "gradient": "paper"}, "--min-supervision 2: --gradient paper runs every"),
        ({"skip_supervision": 2, "gradient": "paper"}, "--skip-supervision 2: --gradient paper carries"),
        ({"step_weights": "last", "gradient": "paper"}, "--step-weights last: with --gradient paper"),
        ({"mix_depths": "steps"}, "--mix-depths steps: only detached steps"),
        (
            {"mix_depths": "steps", "gradient": "paper", "gradient_accumulation": 2},
            "works without --gradient-accumulation only",
        ),
        (
            {"mix_depths": "steps", "gradient": "paper", "step_targets": True},
            "--mix-depths steps: the rows of a batch stand at different steps",
        ),
    ],
    ids=str,
)
def test_objectives_that_do_not_fit_together_are_refused(
    settings: Settings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


@pytest.mark.parametrize("kv_source", ["context", "state"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_resumed_run_ends_in_the_same_bits(settings: Settings, tmp_path: Path, gradient: str, kv_source: str) -> None:
    # Checkpoints every two steps: with "paper" and three supervision steps they fall inside batches.
    changes = {"gradient": gradient, "kv_source": kv_source, "max_steps": 7, "save_steps": 2, "optimizer": "muon"}
    if gradient == "full":
        changes |= {"min_supervision": 1, "skip_supervision": 2}
    changes["keep_last"] = 4
    straight = train(settings(**changes))

    for step in (2, 4):
        resumed = train(
            TrainSettings(resume=straight.parent / f"checkpoint-{step}", output_dir=tmp_path / f"from-{step}")
        )
        for name in (checkpoint.WEIGHTS_FILE, STATE_TENSORS):
            ours, theirs = load_file(straight / name), load_file(resumed / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), f"{name} after resuming at {step}"


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_resumed_run_with_targets_per_step_ends_in_the_same_bits(
    settings: Settings, tmp_path: Path, gradient: str
) -> None:
    changes = {"min_supervision": 1} if gradient == "full" else {}
    straight = train(
        settings(
            dataset="synthetic:easy,mental", replies=["worked", "answer"], step_targets=True, gradient=gradient,
            max_steps=5, save_steps=2, **changes,
        )
    )  # fmt: skip

    resumed = train(TrainSettings(resume=straight.parent / "checkpoint-2", output_dir=tmp_path / "resumed"))

    assert differing_tensors(straight, resumed) == []
    with pytest.raises(ConfigError, match="--step-targets False: the run to resume has True"):
        train(TrainSettings(resume=straight.parent / "checkpoint-2", step_targets=False))


def test_a_resumed_run_goes_on_in_its_own_directory(settings: Settings, tmp_path: Path) -> None:
    first = train(settings(max_steps=2, save_steps=1))
    moved_default = TrainSettings(resume=first.parent / "checkpoint-1")

    last = train(moved_default)

    assert last == first
    assert last.parent == (tmp_path / "run")
    assert not Path("runs/trm").exists()


def test_resuming_with_other_settings_or_data_is_refused(settings: Settings, jsonl: Callable[..., Path]) -> None:
    path = jsonl(*({"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(8)))
    last = train(settings(dataset=str(path), max_steps=1))
    with pytest.raises(ConfigError, match="--batch-size 8: the run to resume has 4"):
        train(TrainSettings(resume=last, batch_size=8))

    path.write_text(path.read_text().replace("3 and 1", "3 plus 1"))
    with pytest.raises(CheckpointError, match="other data"):
        train(TrainSettings(resume=last))


def test_a_run_of_an_older_program_has_the_defaults_of_newer_settings(settings: Settings) -> None:
    last = train(settings(max_steps=1))
    path = last / STATE_JSON
    state = json.loads(path.read_text())
    for name in ("replies", "step_targets", "context_layers"):
        del state["settings"][name]
    path.write_text(json.dumps(state))

    with pytest.raises(ConfigError, match=r"--replies \['answer'\]: the run to resume has \['worked'\]"):
        train(TrainSettings(resume=last, replies=["answer"]))
    same = {"replies": ["worked"], "step_targets": False, "context_layers": []}
    assert train(TrainSettings(resume=last, max_steps=2, **same)).name == "checkpoint-2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version is 99; this program reads 2"),
        ({"step": "two"}, "step is missing or no int"),
        ({"backbone_fingerprint": "0" * 16}, "another backbone"),
        ({"settings": {"dataset": "synthetic:easy", "magic": 1}}, "settings that this program does not know"),
    ],
    ids=["newer", "broken", "other backbone", "unknown setting"],
)
def test_a_foreign_training_state_is_refused(settings: Settings, change: dict[str, object], message: str) -> None:
    last = train(settings(max_steps=1))
    path = last / STATE_JSON
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(CheckpointError, match=message):
        train(TrainSettings(resume=last, max_steps=2))


def test_a_run_needs_data(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="--dataset is needed: gsm8k, "):
        train(settings(dataset=None))


def test_a_run_is_not_overwritten_and_a_finished_one_says_so(settings: Settings) -> None:
    last = train(settings(max_steps=1))
    with pytest.raises(ConfigError, match="holds a run already"):
        train(settings(max_steps=1))
    with pytest.raises(ConfigError, match=r"at step 1 of 1 already; raise --max-steps$"):
        train(TrainSettings(resume=last))


def test_more_steps_than_the_epochs_have_are_warned_of(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    last = train(settings(num_problems=4, max_steps=3))

    assert last.name == "checkpoint-1"
    assert "--max-steps 3: the run ends after 1, with the data; raise --epochs to go on" in caplog.text
    with pytest.raises(ConfigError, match=r"at step 1 of 1 already; raise --epochs$"):
        train(TrainSettings(resume=last))
    assert train(TrainSettings(resume=last, epochs=2)).name == "checkpoint-2"


def test_a_resumed_run_stands_on_the_copy_of_its_backbone(
    settings: Settings, tmp_path: Path, backbone_dir: Path
) -> None:
    moved = tmp_path / "backbone"
    shutil.copytree(backbone_dir, moved)
    first = train(settings(backbone=str(moved), max_steps=2, save_steps=1))
    shutil.rmtree(moved)

    last = train(TrainSettings(resume=first.parent / "checkpoint-1"))

    assert last == first


def test_a_checkpoint_holds_the_average_and_is_servable(settings: Settings) -> None:
    last = train(settings(max_steps=3))
    weights, state = load_file(last / checkpoint.WEIGHTS_FILE), load_file(last / STATE_TENSORS)

    model = TRMForCausalLM.from_pretrained(last)

    assert all(torch.equal(weights[name], tensor) for name, tensor in model.trained_state().items())
    assert any(not torch.equal(weights[name], state[f"master.{name}"]) for name in weights)
    assert model.config.n_supervision == 3
    assert (last / "backbone" / "config.json").is_file()
    assert not (last.parent / "config.json").exists()
    assert json.loads((last.parent / "run.json").read_text())["total_steps"] == 3


def test_a_loss_that_is_not_finite_stops_the_run(settings: Settings) -> None:
    trainer = make_trainer(settings())
    with torch.no_grad():
        trainer.model.decoder.layers[0].attention.o_proj.weight.fill_(float("nan"))

    with pytest.raises(DeviceError, match="step 1"):
        trainer.train_step()


def test_a_tiny_loss_is_not_reported_as_none(settings: Settings) -> None:
    trainer = make_trainer(settings(gradient="paper", autocast="off"))
    with torch.no_grad():
        trainer.model.decoder.halt_head.bias.fill_(-13)  # no label is right yet, and the head knows: ln(1 + e^-13)

    report = trainer.train_step()

    assert report["token_accuracies"] == [0]
    assert report["halting_losses"] == [pytest.approx(2.26e-6, rel=0.3)]


def test_answer_positions_only_give_the_loss_of_all_positions(settings: Settings) -> None:
    """With keys from the context the recursion skips prompt positions; the loss must not notice."""
    trainer = make_trainer(settings(autocast="off"))
    for parameter in trainer.weights.parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = collate([trainer.feed.examples[i] for i in trainer.feed.batches_of(0)[0]], 0)
    whole = trainer.model(batch.input_ids, batch.attention_mask, return_all_steps=True)
    labels = batch.labels[-1]
    labelled = labels != -100
    expected = [
        torch.nn.functional.cross_entropy(logits[labelled], labels[labelled]).item() for logits in whole.all_logits
    ]

    report = trainer.train_step()

    assert report["losses"] == pytest.approx(expected, rel=1e-3)


def test_muon_takes_matrices_and_leaves_heads_and_vectors_to_adamw(settings: Settings) -> None:
    trainer = make_trainer(settings(train_lm_head=True))
    muon, adamw = make_optimizers(trainer.weights.parameters.items(), "muon", 1e-3, 0.1)
    names = {id(p): n for n, p in trainer.weights.parameters.items()}
    adam_names = {names[id(p)] for group in adamw.param_groups for p in group["params"]}

    assert adam_names == {"decoder.halt_head.weight", "decoder.halt_head.bias", "lm_head.weight"}
    assert sum(len(group["params"]) for group in muon.param_groups) == len(names) - 3
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.1, 0.0]


AT_ONCE = {"replies": ["answer"], "step_targets": True, "batch_size": 8, "epochs": 40}


def test_every_step_learns_its_own_target(settings: Settings, jsonl: Callable[..., Path]) -> None:
    path = write_down(jsonl, *[["14", "25", "36"]] * 8)
    quick = {"optimizer": "muon", "lr": 3e-2, "warmup_steps": 2, "epochs": 80, "n_supervision": 4}
    trainer = make_trainer(settings(dataset=path, **(AT_ONCE | quick)))

    first, *_, last = [trainer.train_step() for _ in range(40)]

    assert all(after < before / 3 for before, after in zip(first["losses"], last["losses"], strict=True))
    assert last["token_accuracies"] == [1.0] * 4
    trainer.feed.examples = [replace(example, step_replies=()) for example in trainer.feed.examples]
    answers_only = trainer.feed.prepare(range(8))
    with torch.no_grad():
        right = [losses.right.float().mean().item() for losses in full_steps(trainer.model, answers_only, range(4))]
    assert right == pytest.approx([4 / 6, 4 / 6, 1, 1])  # the first steps say their results, not the answer


def test_a_drawn_depth_leaves_each_step_its_target(settings: Settings, jsonl: Callable[..., Path]) -> None:
    path = write_down(jsonl, *[["14", "25", "36"]] * 8)
    whole = make_trainer(settings(dataset=path, n_supervision=4, **AT_ONCE)).train_step()
    depths = set()
    for seed in range(6):
        trainer = make_trainer(settings(dataset=path, n_supervision=4, min_supervision=1, **AT_ONCE))
        trainer.settings = trainer.settings.model_copy(update={"seed": seed})  # of the depth alone
        shallow = trainer.train_step()["losses"]
        depths.add(len(shallow))
        assert shallow == pytest.approx(whole["losses"][: len(shallow)], rel=1e-5)
    assert len(depths) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"--step-targets: no reply is the answer alone .*--replies worked, .*; add answer to --replies"),
        ({"replies": ["answer"]}, "of a problem with known intermediate results"),
        ({"replies": ["equations"]}, "--replies equations: no training problem has equations"),
    ],
    ids=["worked", "one result", "no equations"],
)
def test_data_without_what_the_targets_need_is_refused(
    settings: Settings, jsonl: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    path = write_down(jsonl, ["1"], ["2"])
    with pytest.raises(ConfigError, match=message):
        train(settings(dataset=path, step_targets=True, **changes))


def test_validation_rows_that_do_not_fit_are_called_so(
    settings: Settings, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    held_out = jsonl({"question": "1?", "answer": "#### 1"}).rename(tmp_path / "held_out.jsonl")
    long = jsonl({"question": "1 + " * 200, "answer": "#### 1"}).rename(tmp_path / "long.jsonl")
    rows = jsonl({"question": "1+1?", "answer": "<<1+1=2>>2 #### 2"})
    with pytest.raises(ConfigError, match=r"no validation problem has equations .*, or --validation-problems 0$"):
        train(settings(dataset=str(rows), validation=str(held_out), replies=["equations"]))
    with pytest.raises(ConfigError, match=r"every validation row is longer .*; raise it, or --validation-problems 0$"):
        train(settings(dataset=str(rows), validation=str(long), max_length=200))


def test_problems_with_more_results_than_steps_are_counted(
    settings: Settings, jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_down(jsonl, ["1", "2", "3", "4"], ["1", "2", "3"])
    train(settings(dataset=path, replies=["answer"], step_targets=True, max_steps=1))

    assert "1 of 2 examples have more results than --n-supervision 3, up to 4: their answer is never" in caplog.text


@pytest.mark.parametrize("given", ["worked,answer", "worked answer"])
def test_replies_may_be_several(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrainSettings.from_command_line(["--replies", *given.split()]).replies == ["worked", "answer"]
    monkeypatch.setenv("TRM_REPLIES", given)
    assert TrainSettings.from_command_line([]).replies == ["worked", "answer"]
    with pytest.raises(ConfigError, match=r"--replies 'prose': Input should be 'worked', 'equations' or 'answer'"):
        TrainSettings.from_command_line(["--replies", "prose"])


@pytest.mark.parametrize("given", ["2", "[2]", "0, 2", "[0, 2]"])
def test_context_layers_in_a_file(given: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"context_layers: {given}\n")

    assert TrainSettings.from_command_line(["--config", str(file)]).context_layers in ([2], [0, 2])


def test_a_checkpoint_says_how_much_work_its_replies_show(
    settings: Callable[..., TrainSettings], jsonl: Callable[..., Path]
) -> None:
    mixed = settings(dataset="synthetic:easy,mental", replies=["equations"], max_steps=1)

    assert checkpoint.read_config(train(mixed)).work == ["equations", "none"]
    assert checkpoint.read_config(train(settings(output_dir=mixed.output_dir / "2", max_steps=1))).work == ["full"]
    bare = str(jsonl({"question": "1 and 1?", "answer": "#### 2"}))
    both = settings(dataset=bare, replies=["worked", "equations"], output_dir=mixed.output_dir / "3", max_steps=1)
    assert checkpoint.read_config(train(both)).work == ["full"], "no reply is equations alone"


@pytest.mark.parametrize(
    ("changes", "large", "dtype"),
    [({}, 0, "bfloat16"), ({}, 10**9, "float32"), ({"autocast": "off"}, 0, "float32")],
    ids=["large", "small", "no bfloat16 products"],
)
def test_a_large_backbone_is_in_the_type_that_serving_takes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], large: int, dtype: str
) -> None:
    monkeypatch.setattr("trm.loading.LARGE", large)
    monkeypatch.setattr("trm.loading.has_fast_bfloat16", lambda device: True)

    last = train(settings(**changes, max_steps=1))

    assert json.loads((last / STATE_JSON).read_text())["settings"]["backbone_dtype"] == dtype
    assert TRMForCausalLM.from_pretrained(last).backbone.dtype == torch.float32
