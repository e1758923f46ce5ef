"""The processes of one run, as torchrun starts them: who this one is, and sums over all of them.

Every process holds the whole model and a share of each batch's rows. With a single process every function here
gives back what it was given.
"""

import os
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def start(device: str) -> None:
    """Meet the others, where the launcher says that there are any; gloo on CPUs, nccl with one GPU for each.

    A later stage of the same build only waits for them.
    """
    if count() == 1:
        return
    if dist.is_initialized():
        wait()
        return
    if device == "cuda":
        torch.cuda.set_device(_local_rank())
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def wait() -> None:
    """Until all are here: what the first one has written is there for the others."""
    if count() > 1:
        dist.barrier()


def leave() -> None:
    """Take leave of the others, at the end."""
    if count() > 1 and dist.is_initialized():
        dist.destroy_process_group()


def log_level() -> str:
    """The first one tells what happens, the others only what it cannot know."""
    return "INFO" if rank() == 0 else "ERROR"


def rank() -> int:
    """The number of this process; 0 alone writes."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def count_here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if count() > 1 else 1


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", rank()))


def share(rows: Tensor) -> Tensor:
    """This process's rows of a batch (B, …): every `count()`-th; the first row where there are too few."""
    return rows[rank() :: count()] if rank() < len(rows) else rows[:1]


def whole(own: Tensor, num_rows: int) -> Tensor:
    """All rows (B, …) of a batch, from everybody's `share` of it."""
    rows = own.new_zeros(num_rows, *own.shape[1:])
    mine = rows[rank() :: count()]
    mine.copy_(own[: len(mine)])
    return add(rows)


def add(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def add_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the sum of all gradients, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if count() > 1:
        flat = add(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


def from_rank(source: int, tensor: Tensor) -> Tensor:
    """The tensor of process `source`, in place."""
    if count() > 1:
        dist.broadcast(tensor, source)
    return tensor


def agree(value: T) -> T:
    """The value of process 0."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def any_of(value: bool, device: str) -> bool:
    """Whether it is so in any process."""
    return bool(add(torch.tensor(int(value), device=device)))
