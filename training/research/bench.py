"""How fast the trainer is against the plain loop: `python -m training.research.bench [flags of trm-train]`.

Both train on `--num-problems` random problems as long as GSM8K's, on the bundled backbone or another. What keeping the
backbone's states costs, once, is said beside the ratio. One JSON line.
"""

import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

import torch

from training.batches import collate
from training.building import model_settings
from training.config import TrainSettings
from training.research.reference import random_order, train_plainly
from training.trainer import Trainer
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.chat import ChatFormat, Example
from trm.device import use_device
from trm.settings import run_command

ROUNDS = 3
PROMPT = (4.59, 0.28)  # mean and deviation of the logarithms of GSM8K's lengths, in the bundled model's tokens
ANSWER = (4.52, 0.45)
CORRELATION = 0.55


class BenchSettings(TrainSettings):
    """Measure how fast training is, with these flags of trm-train, against the plain loop."""

    command: ClassVar[str] = "python -m training.research.bench"


def gsm8k_like(number: int, vocab_size: int, seed: int = 0) -> list[Example]:
    """Problems as long as GSM8K's, of random ids."""
    rng = random.Random(seed)
    examples = []
    for _ in range(number):
        first, other = rng.gauss(0, 1), rng.gauss(0, 1)
        second = CORRELATION * first + math.sqrt(1 - CORRELATION**2) * other
        prompt, answer = (round(math.exp(m + s * n)) for (m, s), n in ((PROMPT, first), (ANSWER, second)))
        examples.append(Example(tuple(rng.choices(range(vocab_size), k=prompt + answer)), prompt))
    return examples


def measure(settings: TrainSettings) -> dict[str, Any]:
    """Tokens per second of an epoch of either loop, the median of rounds that alternate, and their ratio.

    On a CPU the clock counts the process's own seconds of CPU, which other programs do not disturb.
    """
    device = use_device(settings.device, settings.num_threads)
    source = settings.backbone or str(bundled_model_path())
    chat = ChatFormat(checkpoint.read_tokenizer(source))
    examples = gsm8k_like(settings.num_problems, len(chat.tokenizer))

    def trainer() -> Trainer:
        torch.manual_seed(settings.seed)
        model = TRMForCausalLM.from_backbone(checkpoint.read_backbone(source), **model_settings(settings))
        return Trainer(settings, model, chat, examples, device)

    fast, plain = trainer(), trainer()
    steps = fast.feed.groups_per_epoch
    batches = [
        collate([examples[i] for i in indices], 0).to(device)
        for indices in random_order(settings.num_problems, settings.batch_size, settings.seed)
    ]
    clock = time.process_time if device == "cpu" else _device_clock

    started = clock()
    fast.keep_states(Path("states"))
    if fast.settings.cache_states != "off":
        for index, example in enumerate(examples):
            fast.feed.states.padded([index], len(example.ids))
    keeping = clock() - started
    seconds: dict[str, list[float]] = {"fast": [], "plain": []}
    for _ in range(ROUNDS):
        started = clock()
        for _ in range(steps):
            fast.train_step()
        seconds["fast"].append(clock() - started)
        started = clock()
        for _ in train_plainly(plain.model, batches, settings, steps, 0, plain.autocast):
            pass
        seconds["plain"].append(clock() - started)

    tokens = sum(len(example.ids) for example in examples)
    fast_s, plain_s = (statistics.median(seconds[name]) for name in ("fast", "plain"))
    return {
        "device": device,
        "autocast": fast.autocast,
        "tokens": tokens,
        "rounds": ROUNDS,
        "plain_tokens_per_s": round(tokens / plain_s, 1),
        "tokens_per_s": round(tokens / fast_s, 1),
        "ratio": round(plain_s / fast_s, 2),
        "keeping_states_s": round(keeping, 2),
    }


def _device_clock() -> float:
    torch.cuda.synchronize()
    return time.monotonic()


def main() -> None:
    """Parse, measure, print."""
    print(json.dumps(measure(BenchSettings.from_command_line())))  # noqa: T201 - the command's result


if __name__ == "__main__":
    run_command(main, BenchSettings.command)
