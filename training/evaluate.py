"""Greedy accuracy of a checkpoint per effort, on problems that training has not seen.

Decodes through the engine in float32, so what is measured is what is served. Effort 0 is the
frozen backbone's own answer and the baseline of every table.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from training.config import EvalSettings
from training.data import load_problems
from training.run import require_writable
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.answers import is_correct
from trm.chat import ChatFormat, solve_messages
from trm.device import lay_out_for_decoding, use_device
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.errors import ConfigError


def evaluate_model(settings: EvalSettings) -> dict[str, Any]:
    """The report: model, data, and per effort accuracy with its interval, tokens and seconds.

    Also written to `report.json` in the directory that `settings.report` names.
    """
    device = use_device(settings.device, settings.num_threads)
    source = settings.model or str(bundled_model_path())
    model = TRMForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
    lay_out_for_decoding(model)
    chat = ChatFormat(checkpoint.read_tokenizer(source), model.config.normalize_text)
    rows = load_problems(settings.dataset, split="heldout", seed=settings.seed, num_problems=settings.limit)
    rows = rows[: settings.limit]
    prompts = [tuple(chat.encode(solve_messages(row.question))) for row in rows]
    trained = model.config.n_supervision
    efforts = list(dict.fromkeys(settings.effort or sorted({0, 1, trained})))
    if settings.report is not None:
        require_writable(settings.report, "--report")

    longest = max(map(len, prompts)) + settings.max_tokens
    if longest > model.config.max_position_embeddings:
        raise ConfigError(
            f"the longest prompt and --max-tokens need {longest} positions; "
            f"the model has {model.config.max_position_embeddings}"
        )
    engine = Engine(model, chat, EngineConfig(max_rows=settings.max_rows, max_model_len=longest, max_queue=len(rows)))
    for effort in efforts:
        if not 0 <= effort <= engine.max_supervision:
            raise ConfigError(f"--effort {effort}: this model takes 0 to {engine.max_supervision}")
    engine.start()
    results: list[dict[str, Any]] = []
    right: dict[int, list[bool]] = {}
    try:
        for effort in efforts:
            params = SamplingParams(max_tokens=settings.max_tokens, n_supervision=effort)
            started = time.monotonic()
            handles = engine.submit([Request(prompt, params) for prompt in prompts])
            replies = [handle.result() for handle in tqdm(handles, desc=f"effort {effort}", unit="problem")]
            right[effort] = [is_correct(reply.text, row.answer) for reply, row in zip(replies, rows, strict=True)]
            correct = sum(right[effort])
            results.append(
                {
                    "effort": effort,
                    "accuracy": correct / len(rows),
                    "interval": list(wilson_interval(correct, len(rows))),
                    "correct": correct,
                    "tokens_per_answer": sum(len(reply.token_ids) for reply in replies) / len(rows),
                    "seconds_per_answer": (time.monotonic() - started) / len(rows),
                }
            )
    finally:
        engine.close()
    if 0 in right:
        for row in results:
            row["against_backbone"] = paired(right[row["effort"]], right[0])
    report = {
        "model": source,
        "dataset": settings.dataset,
        "seed": settings.seed,
        "n": len(rows),
        "trained_effort": trained,
        "efforts": results,
    }
    if settings.report is not None:
        checkpoint.write_json(settings.report / "report.json", report)
    return report


def paired(ours: Sequence[bool], theirs: Sequence[bool]) -> dict[str, Any]:
    """Two ways of answering the same problems: problems that only we got right, only they did, and the
    two-sided p of the exact McNemar test, the chance of a split at least as uneven between equals.
    """
    wins = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    losses = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    trials = wins + losses
    tail = sum(math.comb(trials, k) for k in range(min(wins, losses) + 1)) / 2**trials
    return {"wins": wins, "losses": losses, "p": min(1.0, 2 * tail)}


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927): sensible near 0 and 1 too."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
