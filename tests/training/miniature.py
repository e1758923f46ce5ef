"""The recipe of the bundled model, in miniature. As a command it is what `make model` starts, with a place to write to:

python -m tests.training.miniature TARGET [flags of training.research.bundle]
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from training import pretrain
from training.config import PretrainSettings
from training.research import bundle, controls

SMALL = {"max_steps": 6, "batch_size": 4, "hidden_size": 64, "num_layers": 1, "vocab_size": 400}
TINY = {"num_problems": 16, "batch_size": 4, "context_layers": [0, 1], "lr": 1e-3}


def shrink(replace: Callable[[Any, str, Any], None]) -> None:
    """Make the recipe one of seconds; `replace` is called as setattr is."""
    replace(bundle, "PretrainSettings", partial(PretrainSettings, **SMALL))
    replace(pretrain, "TOKENIZER_PROBLEMS", 200)
    replace(pretrain, "NUM_TEST_PROBLEMS", 3)
    replace(pretrain, "NUM_EVALUATIONS", 1)
    replace(controls, "COUNTED_STEPS", 2)
    replace(bundle, "RUNS", {name: run | TINY for name, run in bundle.RUNS.items()})
    evaluations = {"at once": ("synthetic:mental", 12, [0, 2, 6]), "worked": ("synthetic", 3, [0, 6])}
    replace(bundle, "EVALUATIONS", evaluations)
    replace(bundle, "MAX_TOKENS", 6)


if __name__ == "__main__":
    target = Path(sys.argv.pop(1))
    shrink(setattr)
    bundle.bundled_model_path = lambda: target
    bundle.main()
