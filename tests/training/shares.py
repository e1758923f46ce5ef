"""One process of two, as torchrun starts them: what each makes of the same batches.

python -m tests.training.shares DIRECTORY writes RANK.safetensors
"""

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import make_backbone
from training import ordinary, pretrain, workers
from training.problems.problem import Problem
from trm.chat import Example

BATCHES = [  # of three rows, and of fewer than there are processes
    [Example(tuple(range(3, 12)), 5), Example(tuple(range(20, 26)), 2), Example(tuple(range(30, 42)), 4)],
    [Example(tuple(range(50, 60)), 3)],
]
TESTS = [Problem("1+1?", rf"\boxed{{{answer}}}", "rows") for answer in range(5)]
RIGHT = {"0", "1", "4"}


def make_shares(chat: Any) -> dict[str, Tensor]:
    """Losses and gradients of the batches, and the accuracy on `TESTS`, as if the answers of `RIGHT` were given."""
    found: dict[str, Tensor] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ordinary, "has_fast_bfloat16", lambda device: False)
        patched.setattr(pretrain, "is_correct", lambda reply, answer: answer in RIGHT)
        model = make_backbone(vocab_size=len(chat.tokenizer))
        for number, batch in enumerate(BATCHES):
            model.zero_grad()
            found[f"{number}.loss"] = ordinary.add_gradients(model, batch, pad_id=0)
            found |= {f"{number}.{name}": p.grad.clone() for name, p in model.named_parameters()}
        found["accuracy"] = Tensor([pretrain.greedy_accuracy(model, chat, TESTS, batch_size=2, max_tokens=1)])
    return found


if __name__ == "__main__":
    from trm import bundled_model_path, checkpoint
    from trm.chat import ChatFormat

    workers.start("cpu")
    shares = make_shares(ChatFormat(checkpoint.read_tokenizer(bundled_model_path())))
    save_file(shares, Path(sys.argv[1]) / f"{workers.rank()}.safetensors")
    workers.leave()
