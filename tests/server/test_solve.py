"""POST /solve: the vote, and what is asked of the engine for it."""

import pytest

from server.routes.solve import vote
from trm.chat import solve_messages
from trm.engine.request import Reply, Usage
from trm.errors import Overloaded


def reply(text, finish="stop"):
    return Reply((1, 2), text, finish, Usage(10, 2, 8))


def boxed(*values):
    return [reply(rf"so \boxed{{{value}}}") for value in values]


def test_the_majority_wins_and_its_first_sample_speaks():
    result = vote([*boxed("70", "72", "72.0", "72", "72"), reply("no idea")])

    assert (result.answer, result.boxed, result.solution) == ("72", r"\boxed{72}", r"so \boxed{72}")
    assert result.votes == {"72": 4, "70": 1}
    assert list(result.votes) == ["72", "70"]
    assert result.agreement == pytest.approx(4 / 6)
    assert result.outcome == "boxed"


def test_votes_are_keyed_by_value_and_the_box_is_quoted_as_written():
    result = vote(boxed("1,000", "1000.0", r"\$1000"))

    assert result.votes == {"1000": 3}
    assert result.boxed == r"\boxed{1,000}"


@pytest.mark.parametrize("values", [("2", "1"), ("2", "1", "1", "2"), ("2", "3", "1", "1", "2")], ids=str)
def test_ties_go_to_the_earliest_sample(values):
    assert vote(boxed(*values)).answer == "2"


def test_one_boxed_sample_beats_any_number_without_a_box():
    result = vote([reply("a"), reply("b"), *boxed("5")])

    assert (result.answer, result.agreement, result.solution) == ("5", pytest.approx(1 / 3), r"so \boxed{5}")


@pytest.mark.parametrize(
    ("replies", "outcome"),
    [
        ([reply("I do not know")], "missing"),
        ([reply("so 7", "length")], "truncated"),
        ([reply(r"so \boxed{7", "length")], "truncated"),
        ([reply(r"so \boxed{7")], "truncated"),
        ([reply("no"), reply(r"so \boxed{7", "length")], "missing"),
        ([reply(r"\boxed{7} and then", "length")], "boxed"),
    ],
    ids=str,
)
def test_without_a_box_there_is_no_answer_and_the_first_sample_says_why(replies, outcome):
    result = vote(replies)

    assert result.outcome == outcome
    if outcome != "boxed":
        assert (result.answer, result.boxed, result.votes, result.agreement) == (None, None, {}, 0)
        assert (result.solution, result.finish_reason) == (replies[0].text, replies[0].finish_reason)


def test_the_prompt_is_counted_once():
    usage = vote(boxed("1", "2", "3")).usage

    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 6, 16)
    assert usage.trm.supervision_steps_mean == 4


pytestmark = pytest.mark.anyio


async def test_a_question(client, engine):
    response = await client.post("/solve", json={"question": " How many? "})

    prompt_tokens = len(engine.requests[0].prompt_ids)
    assert response.json() == {
        "answer": "72",
        "outcome": "boxed",
        "boxed": "\\boxed{72}",
        "solution": "so \\boxed{72}",
        "votes": {"72": 1},
        "agreement": 1.0,
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 3,
            "total_tokens": prompt_tokens + 3,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "trm": {"supervision_steps_mean": 4.0, "draft_tokens": 0, "accepted_tokens": 0},
        },
    }
    assert engine.chat.conversations == [solve_messages("How many?")]
    params = engine.requests[0].params
    assert (params.temperature, params.n_supervision) == (0, None)


async def test_several_samples_are_drawn_at_0_7_from_one_fresh_seed(client, engine):
    await client.post("/solve", json={"question": "a", "n": 3, "reasoning_effort": "low"})

    params = [request.params for request in engine.requests]
    assert [p.sample_index for p in params] == [0, 1, 2]
    assert {p.temperature for p in params} == {0.7}
    assert {p.n_supervision for p in params} == {1}
    assert len({p.seed for p in params}) == 1


async def test_a_temperature_and_seed_of_the_callers_are_used(client, engine):
    await client.post("/solve", json={"question": "a", "n": 2, "temperature": 1.5, "seed": 3})

    assert {(r.params.temperature, r.params.seed) for r in engine.requests} == {(1.5, 3)}


async def test_a_token_may_halt_early(client, engine):
    await client.post("/solve", json={"question": "a", "halt_threshold": 0.75, "halt_tolerance": 0.01})
    await client.post("/solve", json={"question": "a", "halt_threshold": None})

    halts = [(request.params.halt_threshold, request.params.halt_tolerance) for request in engine.requests]
    assert halts == [(0.75, 0.01), (None, None)]


async def test_a_list_gives_results_in_order_from_one_submission(client, engine, say):
    engine.script = lambda request: say(rf"\boxed{{{len(request.prompt_ids)}}}")(request)
    questions = ["a", "bb", "ccc"]

    response = await client.post("/solve", json={"question": questions, "n": 2, "seed": 1})

    results = response.json()["results"]
    lengths = [len(engine.chat.encode(solve_messages(question))) for question in questions]
    assert [result["answer"] for result in results] == [str(length) for length in lengths]
    assert [result["usage"]["prompt_tokens"] for result in results] == lengths
    assert all(result["votes"] == {result["answer"]: 2} for result in results)


async def test_a_list_of_one_is_still_a_list(client):
    assert len((await client.post("/solve", json={"question": ["a"]})).json()["results"]) == 1


async def test_a_list_is_taken_whole_or_not_at_all(client, engine):
    engine.refuse = Overloaded("the queue is full")

    response = await client.post("/solve", json={"question": ["a", "b"]})

    assert response.status_code == 429
    assert not engine.requests


async def test_a_question_without_room_for_a_reply_names_the_question(client):
    response = await client.post("/solve", json={"question": ["a", "x" * 400]})

    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "question")
