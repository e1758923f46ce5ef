"""Make the small tokenizer and Qwen2 backbone that the bundled model stands on.

One script from nothing to a directory that transformers loads. Problems are drawn
fresh for every batch, so nothing is seen twice; numbers grow with the run, because a
model this small learns wording first, then copying, then arithmetic. GSM8K's wording,
where it is at hand, joins late. Labels are replies only.

At each point of its curve a run can be taken up again: the same command goes on from there, to the bit on one CPU with
as many processes and threads.
"""

import json
import logging
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from training import ordinary, workers
from training.checkpoints import STATE_TENSORS
from training.config import PretrainSettings
from training.directories import claim
from training.optim import (
    learning_rate_scale,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    set_learning_rate,
)
from training.problems.data import encode_problem, fingerprint, load_problems
from training.problems.problem import Problem
from training.problems.synthetic import MAX_NUMBER, make_problem, parse_families, problems
from training.tokenizer import train_tokenizer
from training.weights import MASTER
from trm import checkpoint
from trm.answers import is_correct
from trm.chat import SYSTEM_PROMPT, ChatFormat, Example, solve_messages
from trm.device import use_device
from trm.errors import CheckpointError, ConfigError, DeviceError

logger = logging.getLogger(__name__)


FIRST_NUMBERS = 20  # operands start this small and reach MAX_NUMBER ...
WIDEN_UNTIL = 0.4  # ... after this share of the run
TEXT_FROM = 0.6  # the text file joins after this share of the run ...
TEXT_SHARE = 0.02  # ... with this share of the rows
MAX_LENGTH = 256  # longer rows of the text file are left out
MAX_POSITIONS = 4096
HEAD_DIM = 32
NUM_KEY_VALUE_HEADS = 2
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.01
POOL_STEPS = 8  # lengths are sorted within pools of this many steps
NUM_EVALUATIONS = 20  # points on the curve in the record
NUM_TEST_PROBLEMS = 300
TURNS = ("system", "developer", "user", "assistant")  # whose names the tokenizer must know well
TOKENIZER_PROBLEMS = 20_000
PRETRAIN_JSON = "pretrain.json"
MODEL_FILES = ("config.json", "tokenizer.json", PRETRAIN_JSON)  # what a run writes over
# What may differ between the parts of one run. The text may have moved: what was read from it may not change.
FREE_ON_RESUME = {"output_dir", "device", "num_threads", "config", "text_file"}


def make_backbone(settings: PretrainSettings, pad_id: int, end_id: int) -> Qwen2ForCausalLM:
    """A Qwen2 model of the given size with random weights in float32."""
    torch.manual_seed(settings.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            attn_implementation="eager",  # on a CPU twice as fast in bfloat16 as the fused kernel, over a whole step
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=-(-settings.hidden_size * 8 // 3 // 64) * 64,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.hidden_size // HEAD_DIM,
            num_key_value_heads=NUM_KEY_VALUE_HEADS,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            pad_token_id=pad_id,
            eos_token_id=end_id,
            bos_token_id=None,
        )
    )


class Curriculum:
    """Which problems a step sees. Problem `i` of the run depends on (seed, i) and the stage only."""

    def __init__(self, settings: PretrainSettings, chat: ChatFormat, text: Sequence[Problem]) -> None:
        self.settings = settings
        self.chat = chat
        self.groups = [parse_families(group) for group in settings.families]
        encoded = [chat.encode_example(p.question, p.solution) for p in text]
        self.text = [example for example in encoded if len(example.ids) <= MAX_LENGTH]

    def examples(self, step: int, count: int) -> list[Example]:
        """`count` fresh examples for this step."""
        settings = self.settings
        progress = step / settings.max_steps
        widening = min(1.0, progress / WIDEN_UNTIL)
        # Stages of ten, so that the split of number combinations stays one per stage.
        max_number = FIRST_NUMBERS + int(widening * (MAX_NUMBER - FIRST_NUMBERS)) // 10 * 10
        rng = random.Random(f"{settings.seed}/{step}")
        examples = []
        for index in range(step * settings.batch_size, step * settings.batch_size + count):
            if self.text and progress >= TEXT_FROM and rng.random() < TEXT_SHARE:
                examples.append(rng.choice(self.text))
                continue
            families = self.groups[index % len(self.groups)]
            problem = make_problem(families, "train", settings.seed, index, max_number)
            examples.append(encode_problem(problem, self.chat, problem.work or "full"))
        return examples

    def batches(self, start: int = 0) -> Iterator[list[Example]]:
        """Batches of similar lengths, drawn from pools of a few steps; from step `start` on."""
        size = self.settings.batch_size
        for first in range(start // POOL_STEPS * POOL_STEPS, self.settings.max_steps, POOL_STEPS):
            pool = self.examples(first, size * POOL_STEPS)
            pool.sort(key=lambda example: len(example.ids))
            order = list(range(POOL_STEPS))
            random.Random(f"{self.settings.seed}/pool/{first}").shuffle(order)
            yield from (pool[i * size : (i + 1) * size] for i in order[max(0, start - first) :])


@torch.inference_mode()
def greedy_accuracy(
    model: Any, chat: ChatFormat, tests: Sequence[Problem], batch_size: int = 128, max_tokens: int = 64
) -> float:
    """Share of problems whose greedy reply is right; prompts padded on the left. Processes share the problems."""
    model.eval()
    correct = 0
    own = tests[workers.rank() :: workers.count()]
    for start in range(0, len(own), batch_size):
        chunk = own[start : start + batch_size]
        prompts = [chat.encode(solve_messages(p.question, work=p.work or "full")) for p in chunk]
        width = max(map(len, prompts))
        pad = chat.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        device = next(model.parameters()).device
        out = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=chat.end_id,
            pad_token_id=pad,
        )
        for problem, row in zip(chunk, out[:, width:].tolist(), strict=True):
            correct += is_correct(chat.decode(row), problem.answer)
    model.train()
    return int(workers.add(torch.tensor(correct, device=model.device))) / len(tests)


def pretrain(settings: PretrainSettings) -> None:
    """Train tokenizer and backbone; write them with a record of the run to `output_dir`.

    An unfinished run of the same settings there goes on. Processes share each batch, and the first one writes.
    """
    device = use_device(settings.device, settings.num_threads)
    workers.start(device)
    with claim(settings.output_dir, settings.command) if workers.rank() == 0 else nullcontext():
        _grow(settings, device)


def _grow(settings: PretrainSettings, device: str) -> None:
    text = load_problems(str(settings.text_file), seed=settings.seed, split="train") if settings.text_file else []
    sample = list(problems(parse_families("all"), "train", settings.seed, TOKENIZER_PROBLEMS))
    corpus = [part for p in sample + list(text) for part in (p.question, p.solution)]
    tokenizer = train_tokenizer(
        [*corpus, *[SYSTEM_PROMPT, *(f"{role}\n" for role in TURNS)] * 1000], settings.vocab_size, MAX_POSITIONS
    )
    chat = ChatFormat(tokenizer)
    model = make_backbone(settings, tokenizer.pad_token_id, chat.end_id).to(device)
    optimizers = make_optimizers(model.named_parameters(), "muon", settings.lr, WEIGHT_DECAY)
    tests = {
        group: list(problems(parse_families(group), "heldout", settings.seed + 1 + number, NUM_TEST_PROBLEMS))
        for number, group in enumerate(settings.families)
    }
    curriculum = Curriculum(settings, chat, text)
    unfinished = Unfinished(settings, fingerprint([*curriculum.examples(0, settings.batch_size), *curriculum.text]))
    curve, running = unfinished.load(model, optimizers)
    done, tokens, seconds = (int(curve[-1][name]) if curve else 0 for name in ("step", "tokens", "seconds"))
    started = time.monotonic() - seconds

    progress = tqdm(
        islice(curriculum.batches(done), settings.max_steps - done),
        initial=done,
        total=settings.max_steps,
        unit="step",
        mininterval=5,
        disable=workers.rank() > 0,
    )
    for step, examples in enumerate(progress, start=done + 1):
        set_learning_rate(optimizers, learning_rate_scale(step - 1, settings.max_steps, WARMUP_STEPS))
        loss = float(ordinary.add_gradients(model, examples, tokenizer.pad_token_id))
        if not torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            raise DeviceError(f"loss is not finite at step {step}; try a lower --lr")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += sum(len(example.ids) for example in examples)
        running = loss if step == 1 else 0.98 * running + 0.02 * loss
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if step % max(1, settings.max_steps // NUM_EVALUATIONS) == 0 or step == settings.max_steps:
            point = {
                "step": step,
                "tokens": tokens,
                "seconds": round(time.monotonic() - started),
                "loss": round(running, 4),
            } | {group: greedy_accuracy(model, chat, rows) for group, rows in tests.items()}
            curve.append(point)
            logger.info("%s", json.dumps(point))
            if workers.rank() == 0:
                unfinished.save(model, optimizers, curve, running)
                save(model, tokenizer, settings, curve)
    if workers.rank() == 0 and done == settings.max_steps:  # it was stopped just before it would have been saved
        save(model, tokenizer, settings, curve)
    unfinished.remove()


def save(model: Qwen2ForCausalLM, tokenizer: Any, settings: PretrainSettings, curve: list[dict[str, float]]) -> None:
    """Write the backbone in bfloat16 with its tokenizer and `pretrain.json`; the live weights stay float32.

    Raises CheckpointError where it cannot be written.
    """
    output_dir = settings.output_dir
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    stored = Qwen2ForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(weights)
    try:
        stored.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
        record = {"settings": settings.model_dump(mode="json"), "curve": curve}
        checkpoint.write_json(output_dir / PRETRAIN_JSON, record)
    except Exception as error:  # each library has its own for a full disk
        raise CheckpointError(
            f"{output_dir}: cannot be saved: {error}; make room, then the same command goes on"
        ) from error


class Unfinished:
    """An unfinished run in a directory of `output_dir`, whole in one file: it is there until the last step is saved."""

    def __init__(self, settings: PretrainSettings, data: str) -> None:
        self.directory = settings.output_dir / "unfinished"
        self.file = self.directory / STATE_TENSORS
        self.identity = {"data": data} | settings.model_dump(mode="json", exclude=FREE_ON_RESUME)

    def save(
        self,
        model: Qwen2ForCausalLM,
        optimizers: Sequence[torch.optim.Optimizer],
        curve: list[dict[str, float]],
        running: float,
    ) -> None:
        """Write weights and moments in float32, the curve so far and the running loss."""
        record = json.dumps({"identity": self.identity, "curve": curve, "running": running})
        tensors = {f"{MASTER}{name}": p for name, p in model.named_parameters()} | optimizer_tensors(optimizers)
        tensors["record"] = torch.tensor(list(record.encode()), dtype=torch.uint8)
        self.directory.mkdir(exist_ok=True)
        checkpoint.write_tensors(self.file, tensors)

    def load(
        self, model: Qwen2ForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
    ) -> tuple[list[dict[str, float]], float]:
        """Put weights and moments back; returns the curve and the running loss, empty for a new run.

        Raises ConfigError where it is another run, or no unfinished one but a model, CheckpointError where the file is
        damaged.
        """
        if not workers.agree(self.file.is_file()):
            output_dir = self.directory.parent
            if workers.agree(any((output_dir / name).exists() for name in MODEL_FILES)):
                raise ConfigError(
                    f"--output-dir {output_dir}: holds a model already; choose another, or remove that one"
                )
            return [], 0.0
        tensors = checkpoint.read_tensors(self.file)
        try:
            record = json.loads(bytes(tensors["record"].tolist()))
            others = [name for name, value in self.identity.items() if record["identity"].get(name) != value]
            if others:
                raise ConfigError(
                    f"{self.directory}: that run has another {', '.join(others)}; give what it was begun with, "
                    f"or another --output-dir, or remove {self.directory.parent} to begin anew"
                )
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(tensors[f"{MASTER}{name}"])
            load_optimizer_tensors(optimizers, tensors)
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.file}: does not fit: {error}; remove {self.directory.parent} to begin anew"
            ) from error
        curve: list[dict[str, float]] = record["curve"]
        logger.info("%s: goes on after step %d", self.directory, curve[-1]["step"])
        return curve, record["running"]

    def remove(self) -> None:
        """All that the run needed is in place. Every process calls this, and the first one removes."""
        workers.wait()
        if workers.rank() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)
