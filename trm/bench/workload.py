"""A model, requests of mixed lengths, and the ways of decoding them that are compared.

Reply lengths are spread as GSM8K's solutions are in the bundled model's tokens: log-normal, median
90, sigma 0.45. The end token is ignored, so that every way decodes the same number of tokens.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from trm import bundled_model_path, checkpoint
from trm.chat import ChatFormat, solve_messages
from trm.engine import Engine, Request, SamplingParams
from trm.engine.row import Row
from trm.engine.scheduler import Scheduler
from trm.engine.slots import Slots
from trm.loading import load_for_decoding
from trm.model import TRMForCausalLM

MEDIAN_TOKENS, SIGMA, LONGEST_RATIO = 90, 0.45, 3.5
SENTENCES = (
    "Tom has {a} apples.",
    "He buys {b} more apples at the store.",
    "Then he gives {c} apples to Anna.",
    "The next day, he finds {a} apples in the park.",
    "His sister gives him {b} apples.",
    "After that, he sells {c} of them.",
)
QUESTION = "How many apples does Tom have now?"

TokenIds = tuple[int, ...]
Result = TypeVar("Result")


def load(source: str | None, num_threads: int, **how: Any) -> tuple[TRMForCausalLM, ChatFormat]:
    """A model, by default the bundled one, in this process, and its words. `how`: as `load_for_decoding` takes it."""
    model = load_for_decoding(source, num_threads=num_threads, **how)
    tokenizer = checkpoint.read_tokenizer(source or bundled_model_path())
    return model, ChatFormat(tokenizer, model.config.normalize_text)


def make_questions(
    count: int, efforts: Sequence[int], seed: int, median_tokens: int = MEDIAN_TOKENS
) -> list[tuple[str, SamplingParams]]:
    """Questions of one to six sentences and replies of mixed length; efforts take turns."""
    rng = random.Random(seed)
    questions = []
    for index in range(count):
        story = " ".join(SENTENCES[: rng.randint(1, len(SENTENCES))])
        numbers = {name: rng.randint(2, 40) for name in "abc"}
        length = rng.lognormvariate(math.log(median_tokens), SIGMA)
        length = max(8, min(round(length), round(LONGEST_RATIO * median_tokens)))
        params = SamplingParams(max_tokens=length, n_supervision=efforts[index % len(efforts)], ignore_eos=True)
        questions.append((f"{story.format(**numbers)} {QUESTION}", params))
    return questions


def make_requests(
    chat: ChatFormat, count: int, efforts: Sequence[int], seed: int, median_tokens: int = MEDIAN_TOKENS
) -> list[Request]:
    """`make_questions` as the engine takes them."""
    questions = make_questions(count, efforts, seed, median_tokens)
    return [Request(tuple(chat.encode(solve_messages(question))), params) for question, params in questions]


def with_params(requests: Sequence[Request], **params: Any) -> list[Request]:
    """The same requests, decoded otherwise."""
    return [Request(request.prompt_ids, replace(request.params, **params)) for request in requests]


def padded_left(
    prompts: Sequence[Sequence[int]], pad_id: int = 0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, S) of prompts that all end at the right."""
    width = max(map(len, prompts))
    ids = [[*[pad_id] * (width - len(prompt)), *prompt] for prompt in prompts]
    mask = [[*[0] * (width - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def decode_with_generate(
    model: TRMForCausalLM, requests: Sequence[Request], batch_size: int, pad_id: int
) -> list[TokenIds]:
    """Static batches through transformers, in arrival order: every row is decoded to the longest of its batch."""
    replies: list[TokenIds] = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        ids, mask = padded_left([r.prompt_ids for r in batch], pad_id, model.device)
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(r.params.max_tokens for r in batch),
            eos_token_id=None,
            pad_token_id=pad_id,
            n_supervision=batch[0].params.n_supervision,
        )
        replies += [
            tuple(row[: r.params.max_tokens]) for row, r in zip(out[:, ids.shape[1] :].tolist(), batch, strict=True)
        ]
    return replies


class LockstepScheduler(Scheduler):
    """A control without depth batching: nobody begins a token before the deepest row has ended its own."""

    def feeding(self) -> list[Row]:
        if any(row.thinking for row in self.running):
            return []
        return super().feeding()


@dataclass(frozen=True)
class Decoded:
    """One timed run of an engine: seconds, replies, and how its counters moved."""

    seconds: float
    replies: list[TokenIds]
    supervision_steps: int
    counters: dict[str, int]


COUNTERS = (
    "steps",
    "row_places",
    "ticks",
    "row_steps",
    "backbone_calls",
    "cached_tokens",
    "generation_tokens",
    "draft_tokens",
    "accepted_tokens",
)


def decode_with_engine(engine: Engine, requests: Sequence[Request]) -> Decoded:
    """Decode everything, as it fits."""
    before = engine.stats()
    started = time.perf_counter()
    replies = engine.generate(requests)
    seconds = time.perf_counter() - started
    after = engine.stats()
    return Decoded(
        seconds,
        [reply.token_ids for reply in replies],
        sum(reply.usage.supervision_steps for reply in replies),
        {name: getattr(after, name) - getattr(before, name) for name in COUNTERS},
    )


def in_turn(ways: Mapping[str, Callable[[], Result]], repeats: int) -> tuple[dict[str, Result], dict[str, list[float]]]:
    """Run all ways once untimed, then `repeats` times in turn, so that a machine that slows down slows all of them.

    Returns the last result and the seconds of every way.
    """
    results = {name: run() for name, run in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            started = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - started)
    return results, seconds


@contextmanager
def model_time(model: TRMForCausalLM) -> Iterator[list[float]]:
    """Adds up, in the list's one element, the seconds inside the model's calls and the cache's reads and writes.

    On a GPU too: each call then waits until the device is done, which costs time elsewhere.
    """
    total, depth = [0.0], [0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                depth[0] -= 1
                if not depth[0]:  # the cache is read inside calls too
                    total[0] += time.perf_counter() - started

        return run

    owners = ((model, "encode"), (model.decoder, "step"), (model, "readout"), (Slots, "read"), (Slots, "write"))
    originals = [(owner, name, vars(owner).get(name), getattr(owner, name)) for owner, name in owners]
    for owner, name, _, call in originals:
        setattr(owner, name, timed(call))
    try:
        yield total
    finally:
        for owner, name, own, _ in originals:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
