"""The chunked cross-entropy against the plain one, and that it makes no logits beyond a block."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import training.cross_entropy
from tests.training.comparing import differing_tensors
from tests.training.test_trainer import make_trainer
from training.batches import IGNORE_INDEX, collate, num_labels
from training.config import TrainSettings
from training.cross_entropy import cross_entropy
from training.run import train
from training.states import States
from training.validation import measure
from trm import TRMForCausalLM
from trm.errors import ConfigError

LABELS, HIDDEN, VOCABULARY = 40, 16, 101


@pytest.fixture(params=[(512, 4096), (7, 13), (40, 50)], ids=["one block", "odd blocks", "a block of one column"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.cross_entropy, "BLOCKS", {"cpu": request.param})


def draw(dtype: torch.dtype = torch.float64, scale: float = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, head, targets of which two are ignored, and the weights of the losses."""
    generator = torch.Generator().manual_seed(0)
    states, head = (
        (torch.randn(rows, HIDDEN, generator=generator) * scale).to(dtype).requires_grad_()
        for rows in (LABELS, VOCABULARY)
    )
    targets = torch.randint(VOCABULARY, (LABELS,), generator=generator)
    targets[3] = targets[9] = IGNORE_INDEX
    return states, head, targets, torch.rand(LABELS, generator=generator).to(dtype)


def results(function: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> list[Tensor]:
    """Losses and hits, and gradients at the states and the head."""
    states, head, targets, weights = inputs
    losses, right = function(states, head, targets)
    return [losses, right, *torch.autograd.grad((losses * weights).sum(), (states, head))]


def plain(states: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(states, head)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)
    return losses, logits.argmax(1) == targets


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_losses_hits_and_gradients_are_those_of_whole_logits(dtype: torch.dtype, tolerance: float) -> None:
    inputs = draw(dtype)

    for ours, theirs in zip(results(cross_entropy, *inputs), results(plain, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("blocks")
def test_products_are_in_bfloat16_under_autocast() -> None:
    inputs = draw(torch.float32)

    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = results(cross_entropy, *inputs), results(plain, *inputs)

    assert ours[0].dtype == ours[2].dtype == ours[3].dtype == torch.float32
    assert torch.equal(ours[1], theirs[1])
    for index in (0, 2, 3):
        torch.testing.assert_close(ours[index], theirs[index], atol=2e-2, rtol=2e-2)
    assert not torch.allclose(ours[0], results(cross_entropy, *inputs)[0], atol=1e-4), "autocast changes something"


@pytest.mark.usefixtures("blocks")
def test_of_equal_logits_the_first_is_the_largest() -> None:
    logits = torch.randint(3, (500, VOCABULARY), generator=torch.Generator().manual_seed(0)).double()
    targets = logits.argmax(1) + torch.arange(500) % 2 * 3

    _, right = cross_entropy(logits, torch.eye(VOCABULARY).double(), targets.clamp(max=VOCABULARY - 1))

    assert right.tolist() == [n % 2 == 0 for n in range(500)]


def test_the_gradient_of_an_all_but_certain_label_is_no_rounding_error() -> None:
    states, head = torch.tensor([[1.0, 1.0]]), torch.tensor([[20.0, 0.1], [0.0, 0.0], [0.0, 0.3]])
    targets = torch.tensor([0])

    def gradient(function: Any, dtype: torch.dtype) -> Tensor:
        own = states.to(dtype).requires_grad_()
        return torch.autograd.grad(function(own, head.to(dtype), targets)[0].sum(), own)[0]

    exact = gradient(plain, torch.float64).float()
    assert float(exact.norm()) == pytest.approx(20 * 2.3 * math.exp(-20.1), rel=0.1)
    torch.testing.assert_close(gradient(cross_entropy, torch.float32), exact, rtol=1e-5, atol=0)
    assert not torch.allclose(gradient(plain, torch.float32), exact, rtol=1e-3, atol=0)


def test_no_labels_no_losses() -> None:
    states, head, targets, _ = draw()

    losses, right = cross_entropy(states[:0], head, targets[:0])

    assert losses.shape == right.shape == (0,)
    assert not torch.autograd.grad(losses.sum(), head)[0].any()


def test_without_gradient_only_logits_are_multiplied() -> None:
    states, head, targets, _ = draw(torch.float32)
    labels = int((targets != IGNORE_INDEX).sum())

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cross_entropy(states, head, targets)

    assert counter.get_total_flops() == 2 * labels * HIDDEN * VOCABULARY


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that anything makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(t.numel() for t in tree_leaves(made) if isinstance(t, Tensor)), 0)
        return made


@pytest.mark.parametrize("train_lm_head", [False, True], ids=["frozen head", "own head"])
@pytest.mark.parametrize("gradient", ["full", "paper"])
def test_logits_are_never_whole(
    settings: Callable[..., TrainSettings], monkeypatch: pytest.MonkeyPatch, gradient: str, train_lm_head: bool
) -> None:
    # With a vocabulary of 151,936 they would be by far the largest tensors.
    monkeypatch.setattr(training.cross_entropy, "BLOCKS", {"cpu": (16, 128)})
    trainer = make_trainer(settings(gradient=gradient, train_lm_head=train_lm_head))
    trainer.train_step()
    head = trainer.model.head.weight
    examples = trainer.feed.examples[:4]

    with Largest() as in_training:
        trainer.train_step()
    with Largest() as in_validation:
        measure(trainer.model, States(trainer.model, examples, trainer.autocast), 4, 0)

    labels = trainer.feed.num_labels()
    assert labels > head.shape[1]
    assert sum(map(num_labels, examples)) > head.shape[1]
    assert max(in_training.numel, in_validation.numel) <= head.numel() < labels * len(head)


def test_with_seen_tokens_only_the_loss_is_over_these_and_validation_over_all(
    settings: Callable[..., TrainSettings],
) -> None:
    seen, everything = (
        make_trainer(settings(train_vocabulary=name, autocast="off", n_supervision=1)) for name in ("seen", "all")
    )
    vocabulary = seen.feed.vocabulary
    assert vocabulary is not None
    tokens = {token for example in seen.feed.examples for token in example.ids[example.label_start :]}
    assert len(vocabulary.head) == len(tokens) < len(vocabulary.places)

    model, batch = seen.model, collate([seen.feed.examples[i] for i in seen.feed.batches_of(0)[0]], 0)
    labelled = batch.labels[-1] != IGNORE_INDEX
    logits = model(batch.input_ids, batch.attention_mask, n_supervision=1).logits[labelled]
    unseen = torch.tensor([token not in tokens for token in range(logits.shape[1])])
    expected = F.cross_entropy(logits.masked_fill(unseen, -torch.inf), batch.labels[-1][labelled])
    for trainer in (seen, everything):
        trainer.validation = trainer.feed.examples[:4]
        trainer.validation_states = States(trainer.model, trainer.validation, trainer.autocast)
    assert seen.validate() == everything.validate()

    over_seen, over_all = seen.train_step()["loss"], everything.train_step()["loss"]

    assert over_seen == pytest.approx(expected.item(), rel=1e-4)
    assert over_seen < over_all


def test_seen_tokens_include_those_of_intermediate_results(settings: Callable[..., TrainSettings]) -> None:
    changes = {"dataset": "synthetic:mental", "step_targets": True, "autocast": "off"}
    seen, everything = (make_trainer(settings(train_vocabulary=name, **changes)) for name in ("seen", "all"))
    vocabulary = seen.feed.vocabulary
    assert vocabulary is not None
    tokens = vocabulary.places.argsort()[-len(vocabulary.head) :]  # the token of each row

    found, expected = (trainer.feed.prepare(range(24)).targets for trainer in (seen, everything))

    assert len(found) > 1
    assert torch.equal(torch.where(found < 0, found, tokens[found.clamp(min=0)]), expected)
    assert (expected == IGNORE_INDEX).any()
    assert seen.train_step()["loss"] < everything.train_step()["loss"]


@pytest.mark.parametrize("kv_source", ["context", "state"])
def test_a_run_on_seen_tokens_resumes_to_the_bit_and_is_served(
    settings: Callable[..., TrainSettings], tmp_path: Path, kv_source: str
) -> None:
    straight = train(settings(train_vocabulary="seen", max_steps=4, save_steps=2, kv_source=kv_source))

    resumed = train(TrainSettings(resume=straight.parent / "checkpoint-2", output_dir=tmp_path / "resumed"))

    assert differing_tensors(resumed, straight) == []
    model = TRMForCausalLM.from_pretrained(straight)
    assert model(torch.arange(5)[None]).logits.shape[-1] == model.config.vocab_size


def test_seen_tokens_and_a_trained_head_are_refused(settings: Callable[..., TrainSettings]) -> None:
    with pytest.raises(ConfigError, match="--train-vocabulary seen: the head must stay frozen"):
        settings(train_vocabulary="seen", train_lm_head=True)
