"""What `trm-train` does on a device, piece by piece: backbone states, recursion with gradient, chunked head, a step.

Operations are those of `training.research.costs`; shares are of the card's own matrix rate.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from transformers import Qwen2Config

from tests.gpu.measures import (
    DEPTHS,
    DEVICE,
    ON_GPU,
    Put,
    Raw,
    at_least,
    attempt,
    empty_cache,
    machine_of,
    sizes_of,
    timed,
)
from training.batches import Batch, collate
from training.cross_entropy import cross_entropy
from training.loss import Prepared, encode, full_steps, objective, prepare, step_weights
from training.research.costs import BatchSizes, operations
from trm import TRMForCausalLM
from trm.backbone import Backbone
from trm.bench.roofline import Machine
from trm.chat import Example

BATCHES = (8, 32) if ON_GPU else (2,)
PROMPT, ANSWER = (96, 96) if ON_GPU else (10, 6)  # tokens; GSM8K's rows have 88 and 93
SHARE = 0.3  # of the matrix rate, that docs/training.md counts with


def training(put: Put, report: Raw) -> None:
    """Both shapes, batches small and large."""
    machine = machine_of(report)
    for shape in DEPTHS:
        model = trained_model(shape)
        for rows in BATCHES:
            pieces(put, f"{shape}, batch {rows}", model, rows, machine)
        del model
        empty_cache()


def trained_model(shape: str) -> TRMForCausalLM:
    """As the trainer has it: the backbone frozen in bfloat16, the decoder in float32."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        backbone = Backbone(Qwen2Config(**sizes_of(shape))).to(torch.bfloat16)
        return TRMForCausalLM.from_backbone(backbone, **DEPTHS[shape])


def pieces(put: Put, name: str, model: TRMForCausalLM, rows: int, machine: Machine) -> None:
    """Seconds, tokens a second and share of the matrix rate of each piece, with products in bfloat16."""
    batch = some_batch(model.config.vocab_size, rows)
    labels = rows * ANSWER
    sizes = BatchSizes(rows, batch.input_ids.shape[1], batch.num_queries, labels)
    work = operations(model.config, sizes, "full", train_lm_head=False)
    with torch.no_grad(), autocast():
        prepared = prepare(model, batch)
    tokens = {"backbone": rows * sizes.positions, "recursion": labels, "readout": labels, "step": labels}
    for piece, call in calls(model, batch, prepared).items():
        done = getattr(work, piece, work.recursion + work.readout)  # a step finds the backbone's states kept
        attempt(put, f"{name}, {piece}", partial(measured, call, done, int(tokens[piece]), machine))
    if ON_GPU:
        put(f"{name}, peak_mb", torch.cuda.max_memory_allocated(DEVICE) / 1e6)


def some_batch(vocabulary: int, rows: int) -> Batch:
    """Made-up problems, all equally long."""
    ids = tuple(5 + place * 7 % (vocabulary - 5) for place in range(PROMPT + ANSWER))
    return collate([Example(ids, PROMPT)] * rows, pad_id=0).to(DEVICE)


def autocast() -> torch.autocast:
    """As the trainer's."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def calls(model: TRMForCausalLM, batch: Batch, prepared: Prepared) -> dict[str, Callable[[], object]]:
    """The pieces by the names of `Operations`, and a step of all but the backbone and the optimiser."""
    depth = model.config.n_supervision
    weights = step_weights("uniform", depth)

    def backbone() -> None:
        with torch.no_grad(), autocast():
            encode(model, batch)

    def recursion() -> None:
        """All supervision steps, each computed twice, as in `full_steps`, with a gradient at every answer."""
        with autocast():
            key_values = prepared.key_values(model)
            y = z = torch.zeros_like(prepared.x)
            total = torch.zeros((), device=DEVICE)

            def step(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
                return model.decoder.step(prepared.x, y, z, prepared.query_rope, key_values)

            for _ in range(depth):
                y, z = recompute_in_backward(step, y, z, use_reentrant=False, preserve_rng_state=False)
                total = total + (y * y).sum()
        total.backward()

    def readout() -> None:
        """Every step's loss, of states that ask for a gradient."""
        answers = prepared.x[prepared.answers[:, 0], prepared.answers[:, 1]].clone().requires_grad_()
        for number in range(depth):
            with autocast():
                losses, _ = cross_entropy(answers, model.head.weight, prepared.step_targets(number)[0])
            losses.sum().backward()

    def step() -> None:
        with autocast():
            steps = list(full_steps(model, prepared, range(depth)))
        objective(steps, weights, None).loss.backward()

    return {"backbone": backbone, "recursion": recursion, "readout": readout, "step": step}


def measured(call: Callable[[], object], done: float, tokens: int, machine: Machine) -> Raw:
    """One piece of so many operations and tokens."""
    seconds = timed(call) / 1e3
    share = done / seconds / machine.operations_per_s
    return {
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "tflop": done / 1e12,
        **at_least("share of the matrix rate", SHARE, share),
    }
