"""P10: the same request gives the same bits, tokens and log probabilities, alone or among others."""

import copy
import functools
import random
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.conftest import make_model
from trm import TRMForCausalLM, bundled_model_path
from trm.chat import ChatFormat, solve_messages
from trm.device import has_fast_bfloat16
from trm.engine import Engine, EngineConfig, Reply, Request, SamplingParams
from trm.engine.engine import host
from trm.linear import has_int8, has_packed_bfloat16
from trm.loading import load_beside, load_for_decoding, prepare_for_decoding

pytestmark = pytest.mark.skipif(
    not (has_fast_bfloat16("cpu") and has_packed_bfloat16()), reason="this processor has no bfloat16 products"
)

LONGEST = 200  # positions: several widths of exact attention
# More inputs than 1024: there, oneDNN sums the product of a single row in another order.
SIZES = {"vocab_size": 300, "intermediate_size": 1280, "num_hidden_layers": 2}


@functools.cache
def packed_model(kv_source: str, quantize: str | None) -> TRMForCausalLM:
    """A small model whose replies wander."""
    if quantize is not None and not has_int8():
        pytest.skip("this processor has no fast int8 products")
    depth: dict[str, Any] = {"n_latent": 1, "n_cycles": 2, "n_supervision": 2}
    mixed = [0, 1, 2] if kv_source == "context" else None
    model = make_model(kv_source=kv_source, context_layers=mixed, scale=1.0, sizes=SIZES, **depth)
    return prepare_for_decoding(model.to(torch.bfloat16), quantize)


OTHERS: dict[str, dict[str, Any]] = {
    "wide": {"n_latent": 2, "n_cycles": 1, "n_layers": 2, "context_layers": [1, 2], "own_lm_head": True},
    "state": {"n_latent": 1, "n_cycles": 1, "kv_source": "state"},
}


@functools.cache
def beside(quantize: str | None) -> Mapping[str, TRMForCausalLM]:
    """Decoders of other shapes on the packed backbone of the model with keys from the context, from their files."""
    first, chat = packed_model("context", quantize), ChatFormat(AutoTokenizer.from_pretrained(bundled_model_path()))
    first.backbone.identity = "the same"
    found = {}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("trm.checkpoint.backbone_identity", lambda *args: "the same")  # packed weights have none
        for name, shape in OTHERS.items():
            model = make_model(scale=1.0, sizes=SIZES, n_supervision=2, **shape)
            if model.lm_head is not None:
                model.lm_head.weight.data = model.lm_head.weight.flip(0)
            model.save_pretrained(f"{folder}/{name}", chat.tokenizer)
            found[name], _ = load_beside(f"{folder}/{name}", first, chat)
    return found


def bits(reply: Reply) -> Any:
    """All that a reply says in numbers."""
    return reply.token_ids, reply.logprobs, reply.traces, reply.finish_reason


@functools.cache
def alone(kv_source: str, quantize: str | None) -> Engine:
    """An engine that decodes one request at a time, without drafts; with `kv_source` "several" that of any decoder."""
    chat = ChatFormat(AutoTokenizer.from_pretrained(bundled_model_path()))
    chat.end_id = 2
    config = EngineConfig(max_rows=1, max_model_len=LONGEST, max_draft_tokens=0)
    if kv_source != "several":
        return Engine(packed_model(kv_source, quantize), chat, config)
    others = {name: host(model, chat) for name, model in beside(quantize).items()}
    return Engine(packed_model("context", quantize), chat, config, others)


def among(engine: Engine, **config: Any) -> Engine:
    """An engine of the same decoders for company."""
    sizes = {"max_model_len": LONGEST, "max_queue": 100} | config
    others = {name: host(other.model, other.chat) for name, other in engine.decoders.items() if name is not None}
    return Engine(engine.model, engine.chat, EngineConfig(**sizes), others)


def some_request(rng: random.Random) -> Request:
    prompt = tuple(rng.randrange(3, 300) for _ in range(rng.randint(1, 150)))
    params = SamplingParams(
        max_tokens=rng.randint(1, 12),
        temperature=rng.choice((0.0, 0.7, 1.5)),
        top_p=rng.choice((1.0, 0.9)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        seed=rng.randrange(100),
        n_supervision=rng.choice((0, 1, 2, 3)),
        logprobs=rng.choice((0, 3)),
    )
    return Request(prompt, params)


CASES = [(kv_source, quantize) for quantize in (None, "int8") for kv_source in ("context", "state", "several")]


@pytest.mark.parametrize(("kv_source", "quantize"), CASES)
def test_engine_says_that_it_is_exact(kv_source, quantize):
    assert alone(kv_source, quantize).exact
    assert among(alone(kv_source, quantize), max_rows=8).exact


@pytest.mark.parametrize(("kv_source", "quantize"), CASES)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), data=st.data())
def test_replies_are_the_same_to_the_bit_in_any_company(kv_source, quantize, seed, data):
    """Lengths, order, arrival, slots, the pieces in which prompts are cached, drafts, rows of other decoders on the
    same backbone: nothing moves a bit.
    """
    rng, solo = random.Random(seed), alone(kv_source, quantize)
    requests = [replace(some_request(rng), decoder=rng.choice(list(solo.decoders))) for _ in range(rng.randint(2, 9))]
    requests += [replace(one, params=replace(one.params, sample_index=1)) for one in requests[:2]]  # share a prompt
    engine = among(
        solo, max_rows=data.draw(st.integers(2, 8)), prefill_chunk=data.draw(st.sampled_from((1, 7, 64, 256)))
    )
    drafted = data.draw(st.sampled_from((0, 0, 1, 3)))
    for decoder in engine.decoders.values():
        decoder.drafter.length = lambda rows, num_running: drafted

    expected = [bits(solo.generate([one])[0]) for one in requests]
    order = rng.sample(range(len(requests)), len(requests))
    handles = {}
    for index in order:
        [handles[index]] = engine.submit([requests[index]])
        for _ in range(rng.randint(0, 3)):
            engine.step()
    while engine.step():
        pass

    assert [bits(handles[index].result()) for index in range(len(requests))] == expected


def test_a_conversation_goes_on_the_same_whether_its_beginning_was_kept_or_not():
    """Keys of a reply were computed token by token; a prompt that holds it computes them in one piece."""
    rng = random.Random(0)
    first = some_request(rng)
    first = replace(first, params=replace(first.params, max_tokens=30, ignore_eos=True, n_supervision=2))
    keeps, fresh = (among(alone("context", None), max_rows=2) for _ in range(2))
    [said] = keeps.generate([first])
    second = replace(first, prompt_ids=(*first.prompt_ids, *said.token_ids, 7, 8))

    [kept], [computed] = keeps.generate([second]), fresh.generate([second])

    assert kept.usage.cached_tokens >= len(first.prompt_ids) + 29 > computed.usage.cached_tokens
    assert bits(kept) == bits(computed)


def test_one_among_64_others_of_the_bundled_model():
    model = load_for_decoding(None, dtype="bfloat16")
    chat = ChatFormat(AutoTokenizer.from_pretrained(bundled_model_path()))
    questions = [
        f"Tom has {n} apples and buys {n + i} more. How many apples has he?" for n in range(5) for i in range(13)
    ]
    requests = [
        Request(tuple(chat.encode(solve_messages(question))), SamplingParams(max_tokens=24, logprobs=2))
        for question in questions
    ]
    together = Engine(model, chat, EngineConfig(max_rows=65, max_model_len=160)).generate(requests)
    solo = Engine(model, chat, EngineConfig(max_rows=1, max_model_len=160))

    for index in range(0, len(requests), 4):
        assert bits(together[index]) == bits(solo.generate([requests[index]])[0])


def test_where_a_bit_differs_the_engine_says_so_and_goes_on(monkeypatch, caplog):
    """The check at the start is a real one: a product that its neighbours move is noticed."""
    model = copy.copy(packed_model("context", None))
    encode = model.encode

    def moved(embedded: torch.Tensor, *args: Any) -> torch.Tensor:
        return encode(embedded, *args) * (1 + len(embedded) / 128)

    monkeypatch.setattr(model, "encode", moved)
    engine = Engine(model, alone("context", None).chat, EngineConfig(max_rows=4, max_model_len=LONGEST))

    assert not engine.exact
    assert "depend on their company" in caplog.text
    assert engine.generate([some_request(random.Random(1))])[0].token_ids


def test_float32_promises_no_bits():
    model = load_for_decoding(None, dtype="float32")

    assert not model.exact
