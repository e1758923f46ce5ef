"""Make the small tokenizer and Qwen2 backbone that the bundled model stands on.

One script from nothing to a directory that transformers loads. Problems are drawn
fresh for every batch, so nothing is seen twice; numbers grow with the run, because a
model this small learns wording first, then copying, then arithmetic. GSM8K's wording,
where it is at hand, joins late. Labels are replies only.
"""

import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from training.batches import IGNORE_INDEX, Batch, collate
from training.data import load_problems
from training.optim import learning_rate_scale, make_optimizers, set_learning_rate
from training.problem import Problem
from training.synthetic import FAMILIES, MAX_NUMBER, make_problem, parse_families, problems
from training.tokenizer import train_tokenizer
from trm.answers import is_correct
from trm.chat import ROLES, SYSTEM_PROMPT, ChatFormat, Example, solve_messages
from trm.errors import DeviceError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes of the backbone and the length of its training."""

    max_steps: int = 5_000
    batch_size: int = 64
    lr: float = 1.2e-2
    weight_decay: float = 0.01
    warmup: int = 200
    seed: int = 0
    families: str = "easy,all"  # half of the problems from the first group, half from the second
    first_numbers: int = 20  # numbers start this small and reach MAX_NUMBER ...
    widen_until: float = 0.4  # ... after this share of the run
    text_from: float = 0.6  # the text file joins after this share of the run ...
    text_share: float = 0.02  # ... with this share of the rows
    max_length: int = 256
    vocab_size: int = 2048
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_key_value_heads: int = 2
    max_positions: int = 4096
    num_evaluations: int = 20  # points on the curve in the record


def make_backbone(config: PretrainConfig, pad_id: int, end_id: int) -> Qwen2ForCausalLM:
    """A Qwen2 model of the given size with random weights in float32."""
    torch.manual_seed(config.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            attn_implementation="eager",  # on a CPU twice as fast in bfloat16 as the fused kernel, over a whole step
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=-(-config.hidden_size * 8 // 3 // 64) * 64,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=True,
            pad_token_id=pad_id,
            eos_token_id=end_id,
            bos_token_id=None,
        )
    )


class Curriculum:
    """Which problems a step sees. Problem `i` of the run depends on (seed, i) and the stage only."""

    def __init__(self, config: PretrainConfig, chat: ChatFormat, text: Sequence[Problem]) -> None:
        self.config = config
        self.chat = chat
        self.groups = [parse_families(group) for group in config.families.split(",")]
        encoded = [chat.encode_example(p.question, p.solution) for p in text]
        self.text = [example for example in encoded if len(example.ids) <= config.max_length]

    def examples(self, step: int, count: int) -> list[Example]:
        """`count` fresh examples for this step."""
        config = self.config
        progress = step / config.max_steps
        widening = min(1.0, progress / config.widen_until)
        # Stages of ten, so that the split of number combinations stays one per stage.
        max_number = config.first_numbers + int(widening * (MAX_NUMBER - config.first_numbers)) // 10 * 10
        rng = random.Random(f"{config.seed}/{step}")
        examples = []
        for index in range(step * config.batch_size, step * config.batch_size + count):
            if self.text and progress >= config.text_from and rng.random() < config.text_share:
                examples.append(rng.choice(self.text))
                continue
            families = self.groups[index % len(self.groups)]
            problem = make_problem(families, "train", config.seed, index, max_number)
            examples.append(self.chat.encode_example(problem.question, problem.solution))
        return examples

    def batches(self, pool_batches: int = 8) -> Iterator[list[Example]]:
        """Batches of similar lengths, drawn from pools of a few steps."""
        size = self.config.batch_size
        for first in range(0, self.config.max_steps, pool_batches):
            pool = self.examples(first, size * pool_batches)
            pool.sort(key=lambda example: len(example.ids))
            order = list(range(pool_batches))
            random.Random(f"{self.config.seed}/pool/{first}").shuffle(order)
            yield from (pool[i * size : (i + 1) * size] for i in order)


def reply_loss(model: Qwen2ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over reply tokens; the head runs at labelled positions only."""
    # Padding stands on the right, where no real token can see it: causal attention needs no mask.
    hidden = model.model(input_ids=batch.input_ids, use_cache=False)
    labelled = batch.labels != IGNORE_INDEX
    logits = model.lm_head(hidden.last_hidden_state[labelled])
    return F.cross_entropy(logits.float(), batch.labels[labelled])


@torch.inference_mode()
def greedy_accuracy(model: Any, chat: ChatFormat, tests: Sequence[Problem], batch_size: int = 128, max_tokens: int = 64) -> float:
    """Share of problems whose greedy reply is right; prompts padded on the left."""
    model.eval()
    correct = 0
    for start in range(0, len(tests), batch_size):
        chunk = tests[start : start + batch_size]
        prompts = [chat.encode(solve_messages(p.question)) for p in chunk]
        width = max(map(len, prompts))
        pad = chat.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        device = next(model.parameters()).device
        out = model.generate(
            ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_tokens, do_sample=False, eos_token_id=chat.end_id, pad_token_id=pad
        )
        for problem, row in zip(chunk, out[:, width:].tolist(), strict=True):
            correct += is_correct(chat.decode(row), problem.answer)
    model.train()
    return correct / len(tests)


def pretrain(config: PretrainConfig, output_dir: Path, text_file: Path | None, device: str) -> None:
    """Train tokenizer and backbone; write them with a record of the run to `output_dir`."""
    text = load_problems(str(text_file), seed=config.seed, split="train") if text_file else []
    sample = list(problems(parse_families("all"), "train", config.seed, 20_000))
    corpus = [part for p in sample + list(text) for part in (p.question, p.solution)]
    tokenizer = train_tokenizer([*corpus, *[SYSTEM_PROMPT, *(f"{role}\n" for role in ROLES)] * 1000], config.vocab_size, config.max_positions)
    chat = ChatFormat(tokenizer)
    model = make_backbone(config, tokenizer.pad_token_id, chat.end_id).to(device)
    optimizers = make_optimizers(model.named_parameters(), "muon", config.lr, config.weight_decay)
    tests = list(problems(tuple(FAMILIES), "heldout", config.seed + 1, 300))
    easy = list(problems(parse_families("easy"), "heldout", config.seed + 2, 300))
    record: list[dict[str, float]] = []
    started, tokens, running = time.monotonic(), 0, 0.0

    progress = tqdm(Curriculum(config, chat, text).batches(), total=config.max_steps, unit="step", mininterval=5)
    for step, examples in enumerate(progress, start=1):
        batch = collate(examples, tokenizer.pad_token_id)
        batch = Batch(*(t.to(device) for t in (batch.input_ids, batch.attention_mask, batch.labels)))
        set_learning_rate(optimizers, learning_rate_scale(step - 1, config.max_steps, config.warmup))
        with torch.autocast(device, torch.bfloat16):
            loss = reply_loss(model, batch)
        loss.backward()
        if not torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            raise DeviceError(f"loss is not finite at step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += int(batch.attention_mask.sum())
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if step % max(1, config.max_steps // config.num_evaluations) == 0 or step == config.max_steps:
            point = {
                "step": step,
                "tokens": tokens,
                "seconds": round(time.monotonic() - started),
                "loss": round(running, 4),
                "easy": greedy_accuracy(model, chat, easy),
                "all": greedy_accuracy(model, chat, tests),
            }
            record.append(point)
            logger.info("%s", json.dumps(point))
            save(model, tokenizer, config, record, output_dir)


def save(model: Qwen2ForCausalLM, tokenizer: Any, config: PretrainConfig, record: list[dict[str, float]], output_dir: Path) -> None:
    """Write the backbone in bfloat16 with its tokenizer and `pretrain.json`; the live weights stay float32."""
    output_dir.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    stored = Qwen2ForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(weights)
    stored.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    (output_dir / "pretrain.json").write_text(json.dumps({"config": asdict(config), "curve": record}, indent=2) + "\n")
