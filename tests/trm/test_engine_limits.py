"""What the engine refuses, by name and with the arithmetic, and how large its cache is."""

from collections.abc import Iterator

import pytest

from tests.trm.engines import Listener, assert_empty, expected, make_engine, request, run
from trm.engine import EngineConfig, Request, SamplingParams
from trm.errors import BadRequest, ConfigError, Overloaded

# What is refused


def test_impossible_request_is_refused_with_the_arithmetic(chat):
    engine = make_engine(chat, max_model_len=20)

    with pytest.raises(BadRequest, match=r"14 tokens.*max_tokens is 7.*together 21.*takes 20") as caught:
        engine.submit([request(14, max_tokens=7)])

    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"
    assert_empty(engine)


def test_request_that_just_fits_is_served_exactly(chat, kv_source):
    engine = make_engine(chat, kv_source, max_model_len=20, max_rows=1)
    one = request(14, max_tokens=6, ignore_eos=True)

    [reply] = engine.generate([one])

    assert len(reply.token_ids) == 6
    assert reply.token_ids == expected(engine, one).token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "message", "param"),
    [
        ((), {}, "empty", "prompt"),
        ((3, 16), {}, "outside 0 to 15", "prompt"),
        ((3, -1), {}, "outside 0 to 15", "prompt"),
        ((3,), {"n_supervision": 5}, "5.*0 to 4", "supervision_steps"),
        ((3,), {"n_supervision": -1}, "-1.*0 to 4", "supervision_steps"),
    ],
    ids=["empty", "token-too-large", "token-negative", "effort-too-high", "effort-negative"],
)
def test_request_that_could_never_be_served_is_refused(prompt, params, message, param, chat):
    engine = make_engine(chat)

    with pytest.raises(BadRequest, match=message) as caught:
        engine.submit([request(), Request(prompt, SamplingParams(max_tokens=5, **params))])

    assert caught.value.param == param
    assert_empty(engine)


@pytest.mark.parametrize("prompt", [(), (3, 16), (3,) * 60], ids=["empty", "unknown-token", "too-long"])
def test_what_is_wrong_with_a_prompt_is_told_of_the_field_that_it_came_from(prompt, chat):
    with pytest.raises(BadRequest) as caught:
        make_engine(chat).submit([Request(prompt, SamplingParams(max_tokens=9), prompt_field="question")])

    assert caught.value.param == "question"


class CountedPrompt(tuple[int, ...]):
    """A prompt that counts how often all of it is read."""

    read = 0

    def __iter__(self) -> Iterator[int]:
        type(self).read += 1
        return super().__iter__()


def test_prompt_of_many_samples_is_looked_at_once(chat):
    """It happens on the event loop: 64 samples of 30,000 tokens took a sixth of a second."""
    engine = make_engine(chat, max_rows=1, max_queue=63)
    prompt = CountedPrompt(request(20).prompt_ids)
    CountedPrompt.read = 0

    engine.submit([Request(prompt, SamplingParams(max_tokens=5, sample_index=index)) for index in range(64)])

    assert CountedPrompt.read <= 3  # its smallest, its largest, its digests
    [bad] = [Request((99,), SamplingParams(max_tokens=5))]
    with pytest.raises(BadRequest):
        engine.submit([bad, bad])


def test_overload_is_immediate_and_leaves_the_accepted_alone(chat):
    engine = make_engine(chat, max_rows=1, max_queue=2)
    listener = Listener(engine)
    accepted = listener.submit(request(3), request(4), request(5))

    with pytest.raises(Overloaded):
        listener.submit(request(6))

    run(engine)
    for number in accepted:
        assert listener.reply(number).token_ids == expected(engine, listener.handles[number].request).token_ids
    assert listener.events.keys() == set(accepted)
    listener.submit(request(6))


def test_samples_are_accepted_all_or_none(chat):
    engine = make_engine(chat, max_rows=1, max_queue=2)
    listener = Listener(engine)
    listener.submit(request(3))

    with pytest.raises(Overloaded):
        listener.submit(*[request(4, temperature=1.0, sample_index=index) for index in range(3)])
    assert len(engine.loop.scheduler.waiting) == 1

    run(engine)
    assert listener.events.keys() == {0}


def test_reserved_places_are_filled_given_back_or_kept_through_a_mistake(chat):
    engine = make_engine(chat, max_rows=1, max_queue=2)
    kept, other = engine.reserve(2), engine.reserve(1)
    with pytest.raises(Overloaded):
        engine.reserve(1)
    other.release()
    other.release()
    with pytest.raises(Overloaded):
        engine.submit([request(3), request(4)])
    with pytest.raises(BadRequest):
        engine.submit([Request(())], reservation=kept)
    with pytest.raises(ValueError, match="3 requests for 2 reserved places"):
        engine.submit([request(3)] * 3, reservation=kept)
    assert kept.count == 2

    handles = engine.submit([request(3)], reservation=kept)

    kept.release()
    assert engine.loop.scheduler.reserved == kept.count == 0
    engine.reserve(2)
    run(engine)
    assert handles[0].result().usage.queue_s >= 0


def test_generate_takes_more_requests_than_the_queue_holds(chat):
    """So says its docstring."""
    engine = make_engine(chat, max_rows=2, max_queue=1)
    requests = [request(length) for length in range(1, 11)]

    replies = engine.generate(requests)

    assert [reply.token_ids for reply in replies] == [expected(engine, one).token_ids for one in requests]


# Sizes


@pytest.mark.parametrize(
    "name", ["max_rows", "max_queue", "prefill_chunk", "max_model_len", "kv_cache_bytes", "max_draft_tokens"]
)
def test_impossible_sizes_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name} is -1; it must be at least"):
        EngineConfig(**{name: -1})


def test_cache_too_small_is_refused_with_the_arithmetic(chat):
    per_token = make_engine(chat).bytes_per_token

    with pytest.raises(
        ConfigError, match=rf"holds 9 positions for each of 4 rows.*{per_token} bytes each.*10 are needed"
    ):
        make_engine(chat, max_model_len=10, kv_cache_bytes=9 * 4 * per_token)
    make_engine(chat, max_model_len=10, kv_cache_bytes=10 * 4 * per_token)


def test_length_follows_the_cache_and_never_exceeds_the_model(chat):
    per_token = make_engine(chat).bytes_per_token

    assert make_engine(chat, max_model_len=None, kv_cache_bytes=100 * 4 * per_token).max_model_len == 100
    assert make_engine(chat, max_model_len=None, kv_cache_bytes=10_000 * 4 * per_token).max_model_len == 512
    with pytest.raises(ConfigError, match="max_model_len is 513; this model takes at most 512"):
        make_engine(chat, max_model_len=513)


def test_keys_from_the_state_cost_cache_for_every_call(chat):
    """Two heads of eight numbers, keys and values, in float64: the backbone's layer, then the recursion's entries."""
    entry = 2 * 2 * 8 * 8

    assert make_engine(chat, "context").bytes_per_token == entry * (1 + 1)
    assert make_engine(chat, "state").bytes_per_token == entry * (1 + 4 * 2 * 2)  # up to twice the trained effort
