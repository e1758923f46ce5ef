"""Several decoders on one backbone: who runs when, what they share, how they come and go.

That none of them changes a reply is in test_engine.py and, to the bit, in test_exactness.py.
"""

import gc
import weakref
from typing import Any

import pytest

from tests.conftest import randomize
from tests.trm.conftest import exact_model
from tests.trm.engines import Listener, assert_empty, expected, make_engine, other_model, request, run
from trm import TRMForCausalLM
from trm.engine import Engine
from trm.engine.engine import host
from trm.errors import BadRequest, ConfigError, DeviceError, UnknownModel


def count(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> dict[Any, int]:
    """How often each decoder of an engine has taken a supervision step, from now on."""
    calls: dict[Any, int] = dict.fromkeys(engine.decoders, 0)
    for name, hosted in engine.decoders.items():

        def step(*args: Any, name: Any = name, original: Any = hosted.model.decoder.step) -> Any:
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(hosted.model.decoder, "step", step)
    return calls


def test_a_tick_runs_the_decoders_that_have_rows_and_they_share_the_backbones_calls(chat, monkeypatch):
    engine = make_engine(chat, others=["wide", "state"])
    calls = count(monkeypatch, engine)
    several = [
        request(5, seed, decoder=name, n_supervision=2, ignore_eos=True) for seed, name in enumerate((None, "wide"))
    ]

    replies = engine.generate(several)

    assert calls == {None: 10, "wide": 10, "state": 0}, "two steps for each of five tokens"
    counters = engine.loop.counters
    assert (counters.ticks, counters.row_steps) == (10, 20)
    assert counters.backbone_calls == 6, "one for both prompts, one for each token of both"
    assert [reply.token_ids for reply in replies] == [expected(engine, one).token_ids for one in several]


def test_default_effort_and_its_limit_are_each_decoders_own(chat):
    engine = make_engine(chat, others=["wide"])
    two, three = (engine.generate([request(decoder=name, ignore_eos=True)])[0].usage for name in (None, "wide"))
    engine.decoders["wide"].max_supervision = 3

    assert (two.supervision_steps, three.supervision_steps) == (10, 15)
    engine.check(request(n_supervision=4), engine.decoder(None))
    with pytest.raises(BadRequest, match="supervision_steps is 4; this server takes 0 to 3"):
        engine.submit([request(n_supervision=4, decoder="wide")])


def test_keys_from_the_state_matter_to_their_own_decoder_only(chat):
    """It cannot halt, and its prefixes serve no deeper row; its neighbours can, and theirs do."""
    engine = make_engine(chat, others=["state"])

    with pytest.raises(BadRequest, match="cannot halt early"):
        engine.submit([request(halt_tolerance=0.1, decoder="state")])
    engine.submit([request(halt_tolerance=0.1)])[0].cancel()
    run(engine)
    for name, reused in ((None, 19), ("state", 0)):
        engine.generate([request(20, n_supervision=1, decoder=name)])
        [deeper] = engine.generate([request(20, n_supervision=3, decoder=name)])
        assert deeper.usage.cached_tokens == reused


def test_a_prefix_is_not_taken_over_from_another_decoder(chat):
    engine = make_engine(chat, others=["wide"])

    cached = [
        engine.generate([request(20, decoder=name)])[0].usage.cached_tokens for name in (None, "wide", None, "wide")
    ]

    assert cached == [0, 0, 19, 19]


def test_the_cache_is_as_wide_as_the_widest_needs_it(chat):
    engine = make_engine(chat, others=["wide", "state"])
    entries = max(exact_model("context").config.n_layers, other_model("wide").config.n_layers, 4 * 2)
    per_entry = 2 * 2 * 8 * 8  # keys and values of two heads of size 8 in float64

    assert engine.bytes_per_token == per_entry * (1 + entries)
    runner = engine.loop.runner
    tables = (runner.backbone_slots.keys, runner.backbone_slots.values, runner.slots.keys, runner.slots.values)
    assert engine.stats().kv_cache_bytes == sum(table.nbytes for table in tables)


def test_where_one_decoder_fails_the_rows_of_others_go_on(chat, monkeypatch):
    engine = make_engine(chat, others=["wide"])

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(other_model("wide").decoder, "step", fail)
    listener = Listener(engine)
    good, bad = listener.submit(request(5), request(5, decoder="wide"))
    run(engine)

    assert isinstance(listener.events[bad][-1].error, DeviceError)
    assert listener.reply(good).token_ids == expected(engine, request(5)).token_ids
    assert_empty(engine)


def test_each_decoder_is_drafted_for_by_its_own_costs(chat):
    engine = make_engine(chat, others=["wide"], max_draft_tokens=3)

    ours, theirs = (decoder.drafter for decoder in engine.decoders.values())

    assert ours.costs != theirs.costs
    ours.length = lambda rows, num_running: 2
    theirs.length = lambda rows, num_running: 0
    replies = engine.generate([request(5, decoder=name, max_tokens=8, ignore_eos=True) for name in (None, "wide")])
    assert replies[0].usage.draft_tokens > 0 == replies[1].usage.draft_tokens


def test_an_engine_is_exact_if_all_of_its_decoders_are(chat):
    engine = make_engine(chat, others=["wide"])
    for decoder in engine.decoders.values():
        decoder.exact = True
    assert engine.exact

    engine.decoders["wide"].exact = False

    assert not engine.exact


# Coming and going


def fresh_model(**shape: Any) -> TRMForCausalLM:
    """A decoder that only its test holds."""
    model = TRMForCausalLM.from_backbone(exact_model("context").backbone, n_supervision=3, n_latent=1, **shape)
    return randomize(model, scale=1.0, seed=5).double()


def test_a_decoder_comes_and_goes_while_others_decode(chat):
    engine = make_engine(chat, others=["wide"], max_draft_tokens=2)
    listener = Listener(engine)
    first = listener.submit(request(9, max_tokens=12))
    engine.step()

    engine.load("late", host(other_model("wide"), chat))
    late = listener.submit(request(9, max_tokens=12, decoder="late"))
    for _ in range(4):
        engine.step()
    leaving = engine.unload("late")

    assert engine.rows_of(leaving) == 1, "what was accepted is finished"
    with pytest.raises(UnknownModel, match="decoder 'late' is not loaded"):
        engine.submit([request(decoder="late")])
    run(engine)
    assert engine.rows_of(leaving) == 0
    assert listener.reply(*first).token_ids == expected(engine, request(9, max_tokens=12)).token_ids
    assert listener.reply(*late).token_ids == expected(engine, request(9, max_tokens=12, decoder="wide")).token_ids
    assert all(kept.decoder is not leaving for kept in engine.loop.scheduler._free.values())


def test_nothing_of_an_unloaded_decoder_stays_in_memory(chat):
    engine = make_engine(chat)
    model = fresh_model()
    engine.load("late", host(model, chat))
    left = weakref.ref(model.decoder)
    replies = [engine.generate([request(9, seed, decoder="late")]) for seed in range(3)]
    running = engine.submit([request(9, decoder="late", max_tokens=9)])
    engine.step()
    engine.unload("late")
    run(engine)

    del model, running, replies
    gc.collect()

    assert left() is None


def test_a_request_that_is_read_while_its_decoder_goes_is_refused(chat, monkeypatch):
    engine = make_engine(chat)
    engine.load("late", host(fresh_model(), chat))
    read = engine._read

    def slowly(one: Any) -> Any:
        engine.unload("late")
        return read(one)

    monkeypatch.setattr(engine, "_read", slowly)

    with pytest.raises(UnknownModel, match="was unloaded before"):
        engine.submit([request(decoder="late")])
    assert_empty(engine)


def test_names_and_sizes_that_do_not_fit_are_refused(chat):
    engine = make_engine(chat)
    engine.load("late", host(fresh_model(), chat))

    with pytest.raises(ConfigError, match="'late' is loaded already; unload it first"):
        engine.load("late", host(fresh_model(), chat))
    with pytest.raises(ConfigError, match=r"'more' needs 2 cache entries .* started with 1: name the decoder when it"):
        engine.load("more", host(fresh_model(n_layers=2), chat))
    with pytest.raises(UnknownModel, match="decoder 'more' is not loaded"):
        engine.unload("more")
