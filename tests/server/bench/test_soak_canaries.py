"""When a canary that sings otherwise is forgiven."""

import pytest

from server.bench.soak import canaries
from server.bench.soak.canaries import Canary, make_canaries, part_at_near_tie
from trm import TRMForCausalLM, bundled_model_path, checkpoint, reference
from trm.chat import ChatFormat, solve_messages
from trm.engine import SamplingParams

QUESTION = "Tom has 12 apples. He buys 7 more. How many apples does he have now?"


@pytest.fixture(scope="module")
def bundled():
    path = bundled_model_path()
    return TRMForCausalLM.from_pretrained(path), ChatFormat(checkpoint.read_tokenizer(path))


@pytest.fixture(scope="module", params=[{}, {"temperature": 0.8, "seed": 7}], ids=["greedy", "seeded"])
def canary(request):
    return Canary(QUESTION, SamplingParams(max_tokens=8, n_supervision=1, ignore_eos=True, **request.param))


@pytest.fixture(scope="module")
def reply(bundled, canary):
    model, chat = bundled
    return reference.decode(model, chat.encode(solve_messages(QUESTION)), canary.params, None)


def parting_at(reply, chat, token):
    """The reply's text up to a token, and then something else."""
    return chat.decode(reply.token_ids[:token]) + "#"


@pytest.mark.parametrize("token", [0, 3])
def test_only_where_two_tokens_are_nearly_tied(bundled, canary, reply, token, monkeypatch):
    text, other = bundled[1].decode(reply.token_ids), parting_at(reply, bundled[1], token)

    for gap, forgiven in ((reply.gaps[token] * 0.99, False), (reply.gaps[token] * 1.01, True)):
        monkeypatch.setattr(canaries, "NEAR_TIE", gap)
        assert part_at_near_tie(*bundled, canary, text, other) is forgiven
        assert part_at_near_tie(*bundled, canary, other, text) is forgiven


def test_never_where_neither_text_is_what_the_model_says_alone(bundled, canary, reply, monkeypatch):
    monkeypatch.setattr(canaries, "NEAR_TIE", float("inf"))

    assert not part_at_near_tie(*bundled, canary, parting_at(reply, bundled[1], 1), parting_at(reply, bundled[1], 3))


def test_no_canary_asks_for_more_than_the_model_has():
    made = make_canaries(["one", "two", "three", "four"], 2)

    assert len(made) == 4
    assert all(canary.body["supervision_steps"] <= 2 for canary in made)
    assert [canary.body.get("seed") for canary in made] == [None, None, None, 7]
