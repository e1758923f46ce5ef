"""Batching in depth: who shares a tick with whom, and what is counted."""

import pytest

from tests.trm.engines import Listener, make_engine, request, run


def test_high_effort_never_slows_low_effort(chat, kv_source):
    """In lockstep decoding every row would pay for the deepest."""
    engine = make_engine(chat, kv_source)
    listener = Listener(engine)
    low, high = listener.submit(
        request(1, n_supervision=1, max_tokens=8, ignore_eos=True),
        request(1, n_supervision=4, max_tokens=8, ignore_eos=True),
    )

    for _ in range(8):
        engine.step()

    assert listener.reply(low).finish_reason == "length", "one token per tick"
    assert len(listener.events[high]) == 2, "one token per four ticks"


def test_rows_at_different_steps_share_a_tick(chat, kv_source):
    engine = make_engine(chat, kv_source)
    efforts = (1, 2, 4, 3)

    engine.generate([request(1, n_supervision=effort, max_tokens=12 // effort, ignore_eos=True) for effort in efforts])

    stats = engine.stats()
    assert stats.row_steps == 4 * 12
    assert stats.ticks == 12


def test_long_prompt_does_not_stall_running_rows(chat, kv_source):
    engine = make_engine(chat, kv_source, prefill_chunk=2)
    listener = Listener(engine)
    [running] = listener.submit(request(1, n_supervision=1, max_tokens=20, ignore_eos=True))
    engine.step()
    [long] = listener.submit(request(21))

    for _ in range(9):
        engine.step()

    assert len(listener.events[running]) == 10
    assert not listener.events[long]


def test_statistics_add_up(chat, kv_source):
    engine = make_engine(chat, kv_source, max_rows=3)
    requests = [request(length, n_supervision=length % 5, max_tokens=4) for length in (1, 3, 8, 21, 2, 5)]

    listener = Listener(engine)
    listener.submit(*requests)
    engine.step()
    stats = engine.stats()
    assert (stats.requests_running, stats.requests_waiting) == (3, 3)
    assert stats.kv_cache_usage_ratio == pytest.approx(sum(one.positions for one in requests[:3]) / (3 * 64))
    run(engine)

    stats = engine.stats()
    replies = [listener.reply(number) for number in listener.handles]
    assert (stats.requests_running, stats.requests_waiting, stats.kv_cache_usage_ratio) == (0, 0, 0)
    assert stats.prompt_tokens == sum(len(one.prompt_ids) for one in requests)
    assert stats.generation_tokens == sum(len(reply.token_ids) for reply in replies)
    assert stats.row_steps == sum(reply.usage.supervision_steps for reply in replies)
    tables = (engine.loop.runner.backbone_slots, engine.loop.runner.slots)
    assert stats.kv_cache_bytes == sum(table.keys.nbytes + table.values.nbytes for table in tables)
