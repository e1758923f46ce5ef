"""Problems kept out of training, and the loss of the averaged weights on them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.training.test_trainer import make_trainer
from training.checkpoints import read_state
from training.config import TrainSettings
from training.problems.problem import Problem
from training.run import train
from training.states import States
from training.validation import averaged, hold_out, split_problems
from trm.errors import CheckpointError, ConfigError

Settings = Callable[..., TrainSettings]
PROBLEMS = [Problem(f"question {n % 90}", rf"\boxed{{{n}}}", f"rows:{n}") for n in range(100)]  # ten questions twice


@pytest.mark.parametrize(("count", "taken"), [(256, 10), (3, 3)])
def test_rows_held_out_are_never_trained_on(count: int, taken: int) -> None:
    kept, out = hold_out(PROBLEMS, count, seed=5)

    assert len(out) == taken
    assert not {problem.question for problem in kept} & {problem.question for problem in out}
    assert {problem.question for problem in kept + out} == {problem.question for problem in PROBLEMS}
    assert hold_out(PROBLEMS, count, seed=5) == (kept, out)
    assert hold_out(PROBLEMS, count, seed=6) != (kept, out)


def test_where_the_problems_come_from(settings: Settings, jsonl: Callable[..., Path]) -> None:
    path = str(jsonl(*({"question": f"Q{n}", "answer": f"#### {n}"} for n in range(5))))

    assert split_problems(settings(validation_problems=0), PROBLEMS) == (PROBLEMS, [])
    assert split_problems(settings(dataset="rows.jsonl"), PROBLEMS) == hold_out(PROBLEMS, 4, seed=0)
    kept, out = split_problems(settings(), PROBLEMS)
    assert (kept, len(out)) == (PROBLEMS, 4)
    assert not any(problem.source.startswith("rows") for problem in out)
    _, out = split_problems(settings(validation=path), PROBLEMS)
    assert [problem.question[0] for problem in out] == ["Q"] * 4


def test_validation_problems_that_are_trained_on_are_counted(
    settings: Settings, jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = str(jsonl(*({"question": f"question {n}", "answer": f"#### {n}"} for n in (3, 88, 90, 91))))

    split_problems(settings(validation=path), PROBLEMS)
    split_problems(settings(), PROBLEMS)  # synthetic ones, held out

    [record] = caplog.records
    assert "2 of 4 problems are training problems, too" in record.message


@pytest.mark.parametrize("step_targets", [False, True])
def test_the_loss_is_that_of_the_averaged_weights_at_every_depth(settings: Settings, step_targets: bool) -> None:
    at_once = {"dataset": "synthetic:mental", "step_targets": True} if step_targets else {}
    trainer = make_trainer(settings(autocast="off", batch_size=3, **at_once))
    trainer.validation = trainer.feed.examples[:7]
    assert any(example.step_replies for example in trainer.validation) == step_targets
    trainer.validation_states = States(trainer.model, trainer.validation, trainer.autocast)
    for _ in range(4):
        trainer.train_step()
    before = {name: p.detach().clone() for name, p in trainer.weights.parameters.items()}

    measured = trainer.validate()

    assert all(torch.equal(before[name], p) for name, p in trainer.weights.parameters.items())
    losses, labels = torch.zeros(3), torch.zeros(3)
    with averaged(trainer.weights.ema), torch.no_grad():
        assert any(not torch.equal(before[name], p) for name, p in trainer.weights.parameters.items())
        for example in trainer.validation:
            ids = torch.tensor([example.ids])
            out = trainer.model(ids, return_all_steps=True)
            for step, logits in enumerate(out.all_logits):
                answer = example.ids[example.label_start :]
                wanted = torch.tensor([*example.step_replies, *[answer] * 3][step][: len(answer)])
                tail = logits[0, example.label_start - 1 :][: len(wanted)]
                losses[step] += torch.nn.functional.cross_entropy(tail, wanted, reduction="sum")
                labels[step] += len(wanted)
    assert measured is not None
    assert measured.losses == pytest.approx((losses / labels).tolist(), rel=1e-4)
    assert 0 <= measured.token_accuracies[-1] <= 1


def test_the_best_is_the_lowest_loss_at_the_trained_depth(settings: Settings) -> None:
    run = train(settings(max_steps=6, save_steps=2, lr=1e-2)).parent

    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["validation_losses"][-1] for line in lines if "validation_losses" in line}
    best = min(measured, key=lambda step: measured[step])
    assert sorted(measured) == [2, 4, 6]
    assert json.loads((run / "run.json").read_text())["best"] == {"step": best, "loss": measured[best]}


def test_a_run_may_do_without_any_however_often_it_saves(settings: Settings) -> None:
    last = train(settings(validation_problems=0, epochs=2, save_steps=1))

    assert read_state(last)["validation"] is None


def test_other_validation_problems_are_refused(settings: Settings, jsonl: Callable[..., Path]) -> None:
    path = jsonl(*({"question": f"Q{n}", "answer": f"#### {n}"} for n in range(3)))
    run = train(settings(validation=str(path), max_steps=1)).parent
    path.write_text(path.read_text().replace("Q2", "Q9"))

    with pytest.raises(CheckpointError, match="validated on other problems"):
        train(TrainSettings(resume=run, max_steps=2))


def test_a_run_without_a_validation_file_is_given_none_later(settings: Settings, jsonl: Callable[..., Path]) -> None:
    path = jsonl(*({"question": f"Q{n}", "answer": f"#### {n}"} for n in range(20)))
    run = train(settings(dataset=str(path), max_steps=1)).parent

    with pytest.raises(ConfigError, match=f"--validation {path}: the run to resume has None; leave --validation out"):
        train(TrainSettings(resume=run, max_steps=2, validation=str(path)))
