"""Real weights on a device: how far bfloat16 strays from float32, and how replies to questions are decoded.

Of the bundled model, and of a checkpoint if one is given.
"""

import time
from functools import partial
from pathlib import Path

import torch

from tests.gpu.measure_engine import DRAFT, KINDS, decoded, questions, seconds_of_process
from tests.gpu.measures import DEVICE, ON_GPU, Put, Raw, at_most, attempt, empty_cache, machine_of
from trm import TRMForCausalLM, bundled_model_path
from trm.chat import ChatFormat
from trm.checkpoint import read_tokenizer
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.loading import load_for_decoding

STEPS = (1, 4, 16)
QUESTIONS, TOKENS = (32, 64) if ON_GPU else (4, 24)
ROWS = (1, 32) if ON_GPU else (1, 2)


def agreement(put: Put, report: Raw, checkpoint: Path | None) -> None:
    """The checkpoint first, then the bundled model."""
    imports_s = seconds_of_process()
    sources = {"bundled": bundled_model_path()}
    if checkpoint is None:
        put("checkpoint", {"skipped": "no --model was given"})
    else:
        sources = {"checkpoint": checkpoint} | sources
    for name, source in sources.items():
        attempt(put, f"{name}, start", partial(first_token, source, imports_s))
        attempt(put, f"{name}, agreement", partial(of_types, source))
        replies(put, report, name, source)


def first_token(source: Path, imports_s: float) -> Raw:
    """Seconds from nothing to the first token of an engine of 32 rows, read and captured, after `imports_s`."""
    empty_cache()
    began = time.perf_counter()
    model, chat = load_for_decoding(source, device=DEVICE.type), ChatFormat(read_tokenizer(source))
    read_s = time.perf_counter() - began
    engine = Engine(model, chat, EngineConfig(max_model_len=512))
    engine.generate([Request(questions(chat, 1)[0], SamplingParams(max_tokens=1))])
    seconds = imports_s + time.perf_counter() - began
    engine.close()
    return {"imports_s": imports_s, "read_s": read_s, **at_most("start to first token, s", 20, seconds)}


def of_types(source: Path) -> Raw:
    """See `agree`; both models are loaded."""
    empty_cache()
    wide, narrow = (load_for_decoding(source, device=DEVICE.type, dtype=dtype) for dtype in ("float32", "bfloat16"))
    return agree(wide, narrow, ChatFormat(read_tokenizer(source)))


@torch.inference_mode()
def agree(wide: TRMForCausalLM, narrow: TRMForCausalLM, chat: ChatFormat) -> Raw:
    """Share of tokens that both types choose, after 1, 4 and 16 steps, and how far their logits are apart.

    Teacher-forced on the greedy replies of `wide` at its own depth, up to the end token.
    """
    prompts = questions(chat, QUESTIONS)
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    engine = Engine(wide, chat, EngineConfig(max_rows=min(QUESTIONS, 32), max_model_len=512, max_draft_tokens=0))
    said = engine.generate([Request(prompt, params) for prompt in prompts])
    engine.close()
    steps = [step for step in STEPS if step <= wide.config.max_supervision]
    equal, largest, total, count = dict.fromkeys(steps, 0), dict.fromkeys(steps, 0.0), dict.fromkeys(steps, 0.0), 0
    for prompt, reply in zip(prompts, said, strict=True):
        ids = torch.tensor([[*prompt, *reply.token_ids]], device=DEVICE)
        places = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=DEVICE)  # what each says comes next
        count += len(places)
        for step in steps:
            one, other = (
                model(ids, n_supervision=step, logits_to_keep=places).logits[0].float() for model in (wide, narrow)
            )
            equal[step] += int((one.argmax(-1) == other.argmax(-1)).sum())
            apart = (one - other).abs()
            largest[step] = max(largest[step], float(apart.max()))
            total[step] += float(apart.mean(-1).sum())
    return {
        "tokens": count,
        "agree": {step: equal[step] / count for step in steps},
        "mean_difference_of_logits": {step: total[step] / count for step in steps},
        "largest_difference_of_logits": largest,
    }


def replies(put: Put, report: Raw, name: str, source: Path) -> None:
    """Tokens of replies to questions: greedy and sampled, then one row with drafts."""
    model, machine = load_for_decoding(source, device=DEVICE.type), machine_of(report)
    chat = ChatFormat(read_tokenizer(source))
    prompts = questions(chat, max(ROWS))
    for rows in ROWS:
        decoded(put, f"{name}, {rows} rows", model, chat, rows, KINDS, machine, prompts=prompts)
    greedy = {"greedy": KINDS["greedy"]}
    decoded(put, f"{name}, 1 rows, drafts", model, chat, 1, greedy, machine, draft=DRAFT, prompts=prompts)
