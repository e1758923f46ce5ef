"""Votes of a real server: what they share, what they stream, and when they stop."""

import json
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ServerProcess

pytestmark = pytest.mark.slow

QUESTIONS = [
    "Tom has 12 apples. He buys 7 more and gives 5 to Anna. How many apples does he have left?",
    "Each box holds 6 pencils. Mia has 4 boxes. How many pencils does she have?",
    "A train has 14 cars. 3 are taken off at one stop and 8 are added at the next. How many cars does it have now?",
]


def solve(server: ServerProcess, **body: Any) -> Any:
    response = httpx.post(f"{server.url}/solve", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def cached_prompt_tokens(server: ServerProcess) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=10).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("trm_cached_prompt_tokens_total "))


def test_64_samples_pay_for_one_prompt(server: ServerProcess) -> None:
    """The last token of a prompt is not cached: it decodes like any other."""
    before = cached_prompt_tokens(server)

    result = solve(server, question=QUESTIONS[2], n=64, seed=3, max_tokens=24)

    own = result["usage"]["prompt_tokens"] - 1 - result["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert own > 0
    assert cached_prompt_tokens(server) - before == 64 * (result["usage"]["prompt_tokens"] - 1) - own
    assert result["samples"] == 64


def test_an_early_stop_gives_the_same_answers_for_fewer_tokens(server: ServerProcess) -> None:
    """32 rows decode at once, so half of the samples wait until the others have ended."""
    body: dict[str, Any] = {"question": QUESTIONS, "n": 64, "seed": 11}

    whole, early = (solve(server, **body, early_stop=stop)["results"] for stop in (False, True))

    assert [result["answer"] for result in early] == [result["answer"] for result in whole]
    for result in early:
        assert 1 <= result["samples"] <= 64
        assert sum(result["votes"].values()) <= result["samples"]
    spent = [sum(result["usage"]["completion_tokens"] for result in results) for results in (whole, early)]
    assert spent[1] < 0.9 * spent[0]
    assert sum(result["samples"] for result in early) < 0.9 * 64 * 3


def test_a_streamed_vote_ends_in_the_result_that_is_given_without_a_stream(server: ServerProcess) -> None:
    body: dict[str, Any] = {"question": QUESTIONS, "n": 4, "seed": 11}
    plain = solve(server, **body)["results"]

    with httpx.stream("POST", f"{server.url}/solve", json=body | {"stream": True}, timeout=120) as response:
        *lines, end = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]

    assert end == "[DONE]"
    events = [json.loads(line) for line in lines]
    results = {event["index"]: event["result"] for event in events if event["type"] == "result"}
    for index in range(3):
        votes = [event for event in events if event["type"] == "vote" and event["index"] == index]
        assert [vote["samples"] for vote in votes] == [1, 2, 3, 4]
        for key in ("answer", "votes", "samples", "agreement"):
            assert votes[-1][key] == results[index][key] == plain[index][key]
        assert results[index]["solution"] == plain[index]["solution"]
