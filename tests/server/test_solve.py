"""POST /solve: the vote, and what is asked of the engine for it."""

import asyncio
import json
import time

import pytest

from server.errors import Unavailable
from server.metrics import Metrics
from server.routes import solve
from server.routes.solve import solving
from server.schemas.solve import SolveEnd, SolveVote
from server.worker import Worker
from trm.chat import SYSTEM_PROMPTS, solve_messages
from trm.engine.request import Event, Reply, Request, SamplingParams, Usage
from trm.errors import DeviceError, Overloaded
from trm.voting import ballot


def reply(text, finish="stop"):
    return Reply((1, 2), text, finish, Usage(10, 2, 8))


def boxed(*values):
    return [reply(rf"so \boxed{{{value}}}") for value in values]


def solved(replies):
    ballots = {index: ballot(one.text) for index, one in enumerate(replies) if one.finish_reason != "cancelled"}
    return solve.solved(dict(enumerate(replies)), ballots)


def test_the_majority_wins_and_its_first_sample_speaks():
    result = solved([*boxed("70", "72", "72.0", "72", "72"), reply("no idea")])

    assert (result.answer, result.boxed, result.solution) == ("72", r"\boxed{72}", r"so \boxed{72}")
    assert result.votes == {"72": 4, "70": 1}
    assert list(result.votes) == ["72", "70"]
    assert result.agreement == pytest.approx(4 / 6)
    assert result.outcome == "boxed"


def test_votes_are_keyed_by_value_and_the_box_is_quoted_as_written():
    result = solved(boxed("1,000", "1000.0", r"\$1000"))

    assert result.votes == {"1000": 3}
    assert result.boxed == r"\boxed{1,000}"


def test_an_answer_that_is_no_number_is_shown_as_its_first_sample_wrote_it():
    matrix = r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}"

    result = solved(boxed(r"\mathbb{R}", f"${matrix}$", r"\begin{bmatrix}1\\-2\end{bmatrix}"))

    assert result.answer == matrix
    assert result.votes == {matrix: 2, r"\mathbb{R}": 1}


@pytest.mark.parametrize("values", [("2", "1"), ("2", "1", "1", "2"), ("2", "3", "1", "1", "2")], ids=str)
def test_ties_go_to_the_earliest_sample(values):
    assert solved(boxed(*values)).answer == "2"


def test_one_boxed_sample_beats_any_number_without_a_box():
    result = solved([reply("a"), reply("b"), *boxed("5")])

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
    result = solved(replies)

    assert result.outcome == outcome
    if outcome != "boxed":
        assert (result.answer, result.boxed, result.votes, result.agreement) == (None, None, {}, 0)
        assert (result.solution, result.finish_reason) == (replies[0].text, replies[0].finish_reason)


def test_cancelled_samples_do_not_count_but_what_they_decoded_does():
    result = solved([reply(r"\boxed{1", "cancelled"), *boxed("2", "2"), reply("", "cancelled")])

    assert (result.answer, result.votes, result.samples, result.agreement) == ("2", {"2": 2}, 2, 1)
    assert (result.solution, result.finish_reason) == (r"so \boxed{2}", "stop")
    assert result.usage.completion_tokens == 8


def test_the_prompt_is_counted_once():
    usage = solved(boxed("1", "2", "3")).usage

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
        "samples": 1,
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


@pytest.mark.parametrize("work", SYSTEM_PROMPTS)
async def test_so_much_work_is_shown_by_every_sample_of_every_question(client, engine, work):
    body = {"question": ["a", " b "], "n": 2, "work": work}
    assert (await client.post("/solve", json=body)).status_code == 200
    await stream(client, **body)

    assert engine.chat.conversations == [solve_messages("a", work=work), solve_messages("b", work=work)] * 2
    assert {request.prompt_ids for request in engine.requests} == {
        tuple(engine.chat.encode(solve_messages(question, work=work))) for question in "ab"
    }
    assert len({SYSTEM_PROMPTS[work], *(turns[0]["content"] for turns in engine.chat.conversations)}) == 1


async def test_without_a_wish_all_work_is_shown(client, engine):
    await client.post("/solve", json={"question": "a", "work": None})

    assert engine.chat.conversations == [solve_messages("a", work="full")]


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


# Streams


async def stream(client, **body):
    """The events of a streamed answer."""
    response = await client.post("/solve", json={"stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert end == "[DONE]"
    return [json.loads(event) for event in events]


async def test_a_stream_of_one_sample_is_its_text_and_its_result(client):
    events = await stream(client, question="How many?")

    plain = (await client.post("/solve", json={"question": "How many?"})).json()
    assert events == [
        {"type": "text", "index": 0, "text": "so "},
        {"type": "text", "index": 0, "text": r"\boxed{72}"},
        {"type": "result", "index": 0, "result": plain},
    ]


async def test_a_stream_of_several_samples_tells_how_the_vote_stands(client, engine, say):
    """Sample i ends as the i-th; the second one's answer wins in the end, and the tie before goes to the first."""

    def script(request):
        index = request.params.sample_index
        return say(*"." * index, ("no box", r"\boxed{70}", r"\boxed{72}", r"\boxed{72.0}")[index])(request)

    engine.script = script

    events = await stream(client, question="How many?", n=4)

    plain = (await client.post("/solve", json={"question": "How many?", "n": 4})).json()
    votes = [(event["answer"], event["votes"], event["samples"], event["agreement"]) for event in events[:-1]]
    assert votes == [
        (None, {}, 1, 0),
        ("70", {"70": 1}, 2, 1 / 2),
        ("70", {"70": 1, "72": 1}, 3, 1 / 3),
        ("72", {"72": 2, "70": 1}, 4, 2 / 4),
    ]
    assert {(event["type"], event["index"], event["n"]) for event in events[:-1]} == {("vote", 0, 4)}
    assert events[-1] == {"type": "result", "index": 0, "result": plain}


async def test_a_stream_of_a_list_says_which_question_it_is_about(client, engine, say):
    engine.script = lambda request: say(rf"\boxed{{{len(request.prompt_ids)}}}")(request)
    questions = ["a", "bb"]

    events = await stream(client, question=questions, n=2)

    plain = (await client.post("/solve", json={"question": questions, "n": 2})).json()["results"]
    assert [event["result"] for event in events if event["type"] == "result"] == plain
    assert [(event["index"], event["samples"]) for event in events if event["type"] == "vote"] == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
    ]


async def test_an_error_in_a_stream_is_its_last_event(client, engine):
    engine.script = lambda request: [Event((5,), "so "), Event(finish_reason="error", error=DeviceError("not finite"))]

    text, error = await stream(client, question="a")

    assert text["type"] == "text"
    assert error["error"]["message"] == "not finite"


async def test_a_box_that_takes_long_to_read_holds_nobody_up(client, engine, say):
    """12 samples of a model that was told to write what is slow."""
    engine.script = say(rf"\boxed{{{'1=1=' * 490}}}")
    pauses, ended = [], asyncio.Event()

    async def watch():
        while not ended.is_set():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            pauses.append(time.perf_counter() - before)

    watcher = asyncio.create_task(watch())
    asked = time.perf_counter()
    response = await client.post("/solve", json={"question": "a", "n": 12})
    took = time.perf_counter() - asked
    ended.set()
    await watcher

    assert response.json()["samples"] == 12
    assert max(pauses) < took / 2, "the loop stood still while votes were counted"


# Early stop


@pytest.fixture
def undecided(engine, say):
    """Samples 0 and 1 of every question agree at once; sample 2 stops in the middle until the engine is released."""

    def script(request):
        if request.params.sample_index < 2:
            yield from say(r"\boxed{72}")(request)
        else:
            yield Event((5,), "so ")
            engine.hold()
            yield from say("5")(request)

    engine.script = script


async def test_an_early_stop_cancels_what_can_change_nothing(client, engine, undecided):
    response = await client.post("/solve", json={"question": "a", "n": 3, "early_stop": True})

    result = response.json()
    assert (result["answer"], result["votes"], result["samples"], result["agreement"]) == ("72", {"72": 2}, 2, 1)
    assert [handle.cancelled for handle in engine.handles] == [False, False, True]


async def test_nothing_stops_early_unless_asked(client, engine, say):
    engine.script = say(r"\boxed{72}")

    result = (await client.post("/solve", json={"question": "a", "n": 3})).json()

    assert result["samples"] == 3
    assert not any(handle.cancelled for handle in engine.handles)


async def test_an_early_stop_leaves_other_questions_alone(engine, say):
    """Question 0 is decided by its samples 0 and 1, question 1 by none of them."""

    def script(request):
        question, sample = request.prompt_ids[0], request.params.sample_index
        if sample < 2:
            yield from say(r"\boxed{72}" if question == 0 else "no box")(request)
            return
        yield Event((5,), "so ")
        if question == 0:
            engine.hold()
        yield from say(r"\boxed{1}")(request)

    engine.script = script
    events, _ = solve_with(engine, num_questions=2, early_stop=True)

    ended = [event async for event in until_an_end(events)]
    assert (ended[-1].index, ended[-1].result.samples) == (0, 2)
    assert [handle.cancelled for handle in engine.handles] == [False] * 2 + [True] + [False] * 3
    engine.release()
    rest = [event async for event in events]

    assert [type(event) for event in rest[-2:]] == [SolveVote, SolveEnd]
    assert (rest[-1].index, rest[-1].result.answer, rest[-1].result.samples) == (1, "1", 3)


def solve_with(engine, num_questions, early_stop):
    """What three samples of each question bring, as it comes; and the worker. A prompt is its question's number."""
    metrics = Metrics()
    worker = Worker(engine, metrics)
    submission = worker.reserve(3 * num_questions, "model")
    params = [SamplingParams(sample_index=sample) for sample in range(3)]
    worker.submit(submission, [Request((question,), one) for question in range(num_questions) for one in params])
    return solving(submission, num_questions, 3, early_stop, metrics), worker


async def until_an_end(events):
    """The next events, up to a question's result."""
    async for event in events:
        yield event
        if isinstance(event, SolveEnd):
            return


async def test_a_server_that_stops_ends_an_early_stop_too(engine, undecided):
    events, worker = solve_with(engine, num_questions=1, early_stop=False)
    await anext(events)

    await worker.drain(0)

    with pytest.raises(Unavailable):
        [event async for event in events]
