"""Let a candidate answer the problems through the engine, many at once: what is measured is what is served."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, NoReturn

from tqdm import tqdm

from training.evaluation.answers import Answer, Answers, Key
from training.evaluation.candidates import Candidate, Run
from training.problems.problem import Problem
from trm import TRMForCausalLM
from trm.answers import is_correct
from trm.chat import ChatFormat, solve_messages
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.engine.request import Event
from trm.errors import ConfigError

Decode = Callable[[Run, Sequence[Key]], Iterator[Answer]]


def fingerprint_problems(problems: Sequence[Problem]) -> str:
    """First 16 hex digits of a SHA-256 over questions, solutions, and work where a problem has its own, in order."""
    rows = json.dumps([(p.question, p.solution, *([p.work] if p.work else ())) for p in problems])
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def keys(run: Run, num_problems: int) -> list[Key]:
    """All answers of a run. Samples of one problem are neighbours, so that they share its prefill."""
    samples = range(run.samples) if run.samples else [None]
    return [Key(run.candidate, run.effort, problem, sample) for problem in range(num_problems) for sample in samples]


def answer_problems(
    candidate: Candidate,
    model: TRMForCausalLM,
    chat: ChatFormat,
    problems: Sequence[Problem],
    answers: Answers,
    progress: "tqdm[NoReturn]",
    judged: Callable[[Answer], Answer],
    *,
    seed: int,
    max_tokens: int,
    max_rows: int,
) -> None:
    """Add the answers of the candidate's runs that are not there yet, judged. Raises ConfigError as `decoding` does."""
    with decoding(candidate, model, chat, problems, seed=seed, max_tokens=max_tokens, max_rows=max_rows) as decode:
        for run in candidate.runs:
            wanted = keys(run, len(problems))
            missing = [key for key in wanted if key not in answers.by_key]
            right = sum(answers.by_key[key].right for key in wanted if key in answers.by_key)
            progress.set_description(f"{candidate.name}, effort {run.effort}{', votes' if run.samples else ''}")
            for finished, answer in enumerate(map(judged, decode(run, missing)), len(wanted) - len(missing) + 1):
                answers.add(answer)
                right += answer.right
                progress.update()
                progress.set_postfix(accuracy=f"{right / finished:.1%}", refresh=False)


@contextmanager
def decoding(
    candidate: Candidate,
    model: TRMForCausalLM,
    chat: ChatFormat,
    problems: Sequence[Problem],
    *,
    seed: int,
    max_tokens: int,
    max_rows: int,
) -> Iterator[Decode]:
    """An engine at work: what makes the answers to keys of one of the candidate's runs, each as it is finished.

    Raises ConfigError for an effort that the model does not take, or a prompt that does not fit.
    """
    prompts = encode_prompts(candidate.name, chat, model.config.max_position_embeddings, problems, max_tokens)
    longest = max(map(len, prompts)) + max_tokens
    most = max(len(keys(run, len(problems))) for run in candidate.runs)
    engine = Engine(model, chat, EngineConfig(max_rows=max_rows, max_model_len=longest, max_queue=most))
    for run in candidate.runs:
        if not 0 <= run.effort <= engine.max_supervision:
            raise ConfigError(f"--effort {run.effort}: this model takes 0 to {engine.max_supervision}")
    engine.start()

    def decode(run: Run, wanted: Sequence[Key]) -> Iterator[Answer]:
        requests = [Request(prompts[key.problem], _params(run, key, seed, max_tokens)) for key in wanted]
        last = time.monotonic()
        for index, text, event, now in _replies(engine, requests):
            key = wanted[index]
            yield _answer(key, problems[key.problem], text, event, now - last)
            last = now

    try:
        yield decode
    finally:
        engine.close()


def encode_prompts(
    name: str, chat: ChatFormat, max_positions: int, problems: Sequence[Problem], max_tokens: int
) -> list[tuple[int, ...]]:
    """What a candidate is asked. Raises ConfigError where its positions do not suffice for that and a reply."""
    prompts = [tuple(chat.encode(solve_messages(p.question, work=p.work or "full"))) for p in problems]
    longest = max(map(len, prompts)) + max_tokens
    if longest > max_positions:
        raise ConfigError(
            f"{name}: the longest prompt and --max-tokens need {longest} positions; "
            f"the model has {max_positions}; lower --max-tokens"
        )
    return prompts


def _replies(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, str, Event, float]]:
    """Index, text, last event and time of each reply as it is finished, however late that is asked for.

    Raises a request's error where it failed.
    """
    news: SimpleQueue[tuple[int, Event, float]] = SimpleQueue()
    engine.submit(requests, lambda index, event: news.put((index, event, time.monotonic())))
    texts = [""] * len(requests)
    unfinished = len(requests)
    while unfinished:
        index, event, now = news.get()
        texts[index] += event.text
        if event.error is not None:
            raise event.error
        if event.finish_reason is not None:
            unfinished -= 1
            yield index, texts[index], event, now


def noise_seed(seed: int, problem: int) -> int:
    """Keys the noise of a problem's samples: the same for all problems would make them fail together."""
    return seed + problem


def _params(run: Run, key: Key, seed: int, max_tokens: int) -> SamplingParams:
    sampling: dict[str, Any] = {}
    if key.sample is not None:
        sampling = {"seed": noise_seed(seed, key.problem), "sample_index": key.sample}
        sampling |= {"temperature": run.temperature, "top_p": run.top_p}
    return SamplingParams(max_tokens=max_tokens, n_supervision=run.effort, **sampling)


def _answer(key: Key, problem: Problem, text: str, last: Event, elapsed_s: float) -> Answer:
    assert last.usage is not None, "a final event has its usage"
    return Answer(
        *key,
        source=problem.source,
        question=problem.question,
        expected=problem.answer,
        reply=text,
        right=is_correct(text, problem.answer),
        finish_reason=str(last.finish_reason),
        tokens=last.usage.completion_tokens,
        steps=last.usage.supervision_steps,
        elapsed_s=round(elapsed_s, 6),
    )
