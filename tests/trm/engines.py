"""What the engine's tests share: requests for the exact model, a listener that checks every ending, and the oracle."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from tests.conftest import randomize
from tests.trm.conftest import END, exact_model, solo, some_prompt
from trm import TRMForCausalLM, bundled_model_path, checkpoint, reference
from trm.chat import ChatFormat
from trm.engine import Engine, EngineConfig, Event, Handle, Reply, Request, SamplingParams
from trm.engine.engine import host
from trm.engine.request import Grammar
from trm.loading import prepare_for_decoding

KV_SOURCES = ("context", "state")
OTHERS: dict[str, dict[str, Any]] = {
    "wide": {"n_latent": 2, "n_cycles": 1, "n_layers": 2, "context_layers": [0, 1], "own_lm_head": True},
    "state": {"n_latent": 1, "n_cycles": 1, "kv_source": "state"},
}
"""Decoders of other shapes, beside the one of `exact_model` on its backbone."""
TEXTS = (None, None, None, b"a", b"b", b"ab", b"ba", b"1", b"2", b"12", b" ", b"{", b"}", b'"', b":", b",")
"""What the tokens of `exact_model` spell, in the eyes of a grammar."""


def request(
    length: int = 4, seed: int = 0, *, grammar: Grammar | None = None, decoder: str | None = None, **params: Any
) -> Request:
    """A random prompt for `exact_model`."""
    prompt = some_prompt(length, seed, vocab_size=16)
    return Request(tuple(prompt), SamplingParams(**({"max_tokens": 5} | params)), grammar, decoder=decoder)


def make_engine(
    chat: ChatFormat, kv_source: str = "context", *, draft: int = 0, others: Sequence[str] = (), **config: Any
) -> Engine:
    """An engine of the exact model, and of some of OTHERS.

    `draft`: tokens that are drafted every time, whether that pays or not; by each other decoder one less.
    """
    sizes = {"max_rows": 4, "max_model_len": 64, "max_draft_tokens": draft}
    beside = {name: host(other_model(name), chat) for name in others}
    engine = Engine(exact_model(kv_source), chat, EngineConfig(**(sizes | config)), beside)
    for place, decoder in enumerate(engine.decoders.values() if draft else ()):
        decoder.drafter.length = lambda rows, num_running, place=place: max(0, draft - place)
    return engine


def bundled_engine(**config: Any) -> Engine:
    """The bundled model as it is served: weights laid out for decoding, drafts, shared prefixes."""
    path = bundled_model_path()
    model = TRMForCausalLM.from_pretrained(path)
    prepare_for_decoding(model)
    chat = ChatFormat(checkpoint.read_tokenizer(path), model.config.normalize_text)
    engine = Engine(model, chat, EngineConfig(**config))
    engine.decoders[None].drafter.length = lambda rows, num_running: 3
    return engine


@functools.cache
def other_model(name: str) -> TRMForCausalLM:
    """One of OTHERS, in float64. Not to be changed."""
    shape = {"n_supervision": 3, "max_supervision": 4} | OTHERS[name]
    model = TRMForCausalLM.from_backbone(exact_model("context").backbone, **shape)
    randomize(model, scale=1.0, seed=len(name)).double()
    if model.lm_head is not None:
        model.lm_head.weight.data = model.lm_head.weight.flip(0)
    return model.eval()


@functools.cache
def alone(name: str, prompt: tuple[int, ...], params: SamplingParams, grammar: Grammar | None) -> Any:
    """What one of OTHERS says to one prompt."""
    return reference.decode(other_model(name), prompt, params, END, grammar)


def expected(engine: Engine, one: Request) -> reference.ReferenceReply:
    if one.decoder is not None:
        return alone(one.decoder, one.prompt_ids, one.params, one.grammar)  # type: ignore[no-any-return]
    return solo(engine.model.config.kv_source, one.prompt_ids, one.params, one.grammar)


def run(engine: Engine) -> None:
    while engine.step():
        pass


class Listener:
    """Collects the events of requests submitted through it, and checks that each ends exactly once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: dict[int, list[Event]] = defaultdict(list)
        self.handles: dict[int, Handle] = {}

    def submit(self, *requests: Request) -> list[int]:
        """Submit all together; returns their numbers."""
        first = len(self.handles)
        handles = self.engine.submit(requests, lambda index, event: self.events[first + index].append(event))
        numbers = list(range(first, first + len(handles)))
        self.handles |= dict(zip(numbers, handles, strict=True))
        return numbers

    def reply(self, number: int) -> Reply:
        """The whole reply. Fails unless the request has ended exactly once."""
        events = self.events[number]
        assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
        last = events[-1]
        assert (last.error is not None) == (last.finish_reason == "error")
        assert last.usage is not None
        so_far = accumulate(len(event.token_ids) for event in events)
        assert [event.usage and event.usage.completion_tokens for event in events] == list(so_far)
        return Reply.of(events)


def assert_empty(engine: Engine) -> None:
    """Every slot is free again and nothing is remembered."""
    assert engine.loop.scheduler.running == []
    assert not engine.loop.scheduler.waiting
    assert sorted(engine.loop.scheduler._free) == list(range(engine.config.max_rows))
    assert not engine.step()


def find_ending(kv_source: str, **params: Any) -> Request:
    """A request whose reply reaches the end token, though not at once."""
    for length in range(1, 60):
        one = request(length, **({"max_tokens": 12} | params))
        reply = solo(kv_source, one.prompt_ids, replace(one.params, ignore_eos=False)).token_ids
        if reply[-1] == END and 3 <= len(reply) < 12:
            return one
    raise AssertionError("no prompt of this model ends")
