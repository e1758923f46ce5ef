"""What is promised, on a GPU: in float32 what the CPU says in float32, in bfloat16 the same bits in any company."""

import functools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import make_model
from tests.gpu.devices import DEVICE, on_device
from tests.trm.conftest import END, NEAR_TIE, assert_same_tokens, chat_with, some_prompt
from tests.trm.test_exactness import bits, some_request
from trm import TRMForCausalLM, reference
from trm.chat import ChatFormat
from trm.engine import Engine, EngineConfig, Request, SamplingParams
from trm.engine.engine import host

pytestmark = on_device
SIZES = {"vocab_size": 16}  # so that replies end now and then


@functools.cache
def model_on(device: str, kv_source: str) -> TRMForCausalLM:
    model: TRMForCausalLM = make_model(kv_source=kv_source, sizes=SIZES, max_supervision=4).to(device)
    return model


def some_requests(kv_source: str) -> list[Request]:
    """Prompts and replies across borders of width, any effort, greedy and drawn, with and without rules of halting."""
    rules: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.2, "top_p": 0.8, "seed": 4, "repetition_penalty": 1.2},
        {"halt_tolerance": 0.3} if kv_source == "context" else {"temperature": 0.5, "top_k": 3},
    ]
    return [
        Request(
            tuple(some_prompt(length, index, 16)),
            SamplingParams(max_tokens=12, n_supervision=index % 5, **rules[index % 4]),
        )
        for index, length in enumerate((1, 3, 60, 64, 130, 7, 20, 125, 9, 33))
    ]


@pytest.mark.parametrize("draft", [0, 3])
def test_replies_in_float32_are_those_of_the_cpu(kv_source, draft, tokenizer):
    """P2, P3, P4, P5, P7, P9: the CPU's reference decodes one prompt, without cache, batch or draft."""
    sizes = {"max_rows": 4, "max_model_len": 200, "max_draft_tokens": draft, "row_buckets": (1, 2, 4)}
    engine = Engine(model_on(DEVICE, kv_source), chat_with(tokenizer, END), EngineConfig(**sizes))
    if draft:
        engine.decoders[None].drafter.length = lambda rows, num_running: draft
    requests = some_requests(kv_source)

    replies = engine.generate(requests)

    assert engine.loop.runner.graphs.plain == 0, "all calls can be captured"
    ended = 0
    for one, reply in zip(requests, replies, strict=True):
        solo = reference.decode(model_on("cpu", kv_source), one.prompt_ids, one.params, END)
        assert_same_tokens(reply.token_ids, solo, NEAR_TIE)
        ended += reply.token_ids[-1] == END
        assert END not in reply.token_ids[:-1]
    assert ended, "some reply reaches the end token"


def test_decoders_come_while_others_decode(tokenizer):
    """Both threads capture."""
    model, chat = model_on(DEVICE, "context"), chat_with(tokenizer, END)
    engine = Engine(model, chat, EngineConfig(max_rows=4, max_model_len=200, row_buckets=(1, 2, 4)))
    engine.start()
    requests = [replace(one, params=replace(one.params, ignore_eos=True)) for one in some_requests("context")]
    handles = engine.submit(requests)
    for number in range(3):
        other = TRMForCausalLM.from_backbone(model.backbone, n_latent=1 + number).to(DEVICE)
        engine.load(str(number), host(other, chat))
    handles += engine.submit([replace(one, decoder=str(index % 3)) for index, one in enumerate(requests)])

    replies = [handle.result() for handle in handles]

    assert {reply.finish_reason for reply in replies} == {"length"}
    assert engine.loop.runner.graphs.plain == 0
    assert engine.close()


def test_bfloat16_is_the_same_to_the_bit_in_any_company(kv_source, tokenizer):
    """P10, with calls of one shape."""
    rng = random.Random(0)
    model = make_model(kv_source=kv_source, sizes={"vocab_size": 300}, scale=1.0, n_supervision=2)
    model = model.to(device=DEVICE, dtype=torch.bfloat16)
    chat = ChatFormat(tokenizer)
    chat.end_id = END
    requests = [some_request(rng) for _ in range(12)]
    requests = [replace(one, params=replace(one.params, n_supervision=index % 3)) for index, one in enumerate(requests)]
    engine = Engine(model, chat, EngineConfig(max_rows=8, max_model_len=200, row_buckets=(8,)))

    alone = [bits(engine.generate([one])[0]) for one in requests]
    fresh = Engine(model, chat, EngineConfig(max_rows=8, max_model_len=200, row_buckets=(8,)))

    assert engine.exact
    assert list(map(bits, fresh.generate(requests[::-1])))[::-1] == alone
