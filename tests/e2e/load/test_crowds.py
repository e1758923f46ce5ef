"""500 requests at once, against a queue that holds them and against one that does not.

Every question is asked twice, streamed and not. Every text that arrives is the text of that request decoded alone.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ServerProcess
from tests.e2e.near_tie import assert_near_tie, bundled
from training.problems.synthetic import problems
from trm.chat import solve_messages
from trm.engine import Engine, EngineConfig, Request, SamplingParams

CROWD = 500
PARAMS = SamplingParams(max_tokens=16, n_supervision=1)
TIMEOUT_S = 120  # nobody may wait longer; all of them together take a tenth of it
QUESTIONS = [problem.question for problem in problems(("have", "groups"), "heldout", seed=5, count=CROWD // 2)] * 2


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """Each text as an engine of one row gives it."""
    model, chat = bundled()
    engine = Engine(model, chat, EngineConfig(max_rows=1, max_model_len=512))
    prompts = {question: tuple(chat.encode(solve_messages(question))) for question in QUESTIONS}
    texts = {question: engine.generate([Request(prompt, PARAMS)])[0].text for question, prompt in prompts.items()}
    return [texts[question] for question in QUESTIONS]


async def ask(client: httpx.AsyncClient, question: str, stream: bool) -> httpx.Response:
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": PARAMS.max_tokens,
        "supervision_steps": PARAMS.n_supervision,
        "stream": stream,
    }
    return await client.post("/v1/chat/completions", json=body)


def text(response: httpx.Response) -> str:
    """What a reply says, streamed or whole."""
    if response.headers["content-type"].startswith("application/json"):
        return str(response.json()["choices"][0]["message"]["content"])
    *events, end = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert end == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)


def all_at_once(server: ServerProcess) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=TIMEOUT_S) as client:
            asking = [ask(client, question, stream=index < CROWD // 2) for index, question in enumerate(QUESTIONS)]
            return await asyncio.gather(*asking)

    return asyncio.run(run())


def assert_texts(responses: list[httpx.Response], alone: list[str]) -> None:
    """Every accepted text is the one that was decoded alone, but for near ties, one in 10,000 tokens."""
    accepted = [index for index, response in enumerate(responses) if response.status_code == 200]
    different = [index for index in accepted if text(responses[index]) != alone[index]]
    assert len(different) <= 1
    for index in different:
        assert_near_tie(QUESTIONS[index], PARAMS, text(responses[index]), alone[index])


def metrics(server: ServerProcess) -> dict[str, Any]:
    lines = httpx.get(f"{server.url}/metrics", timeout=10).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_queue_that_is_long_enough_loses_nobody(start_server: Callable[..., ServerProcess], alone: list[str]) -> None:
    server = start_server("--max-model-len", "512", "--max-queue", "1000")

    responses = all_at_once(server)

    assert [response.status_code for response in responses] == [200] * CROWD
    assert_texts(responses, alone)
    assert metrics(server)["trm_num_requests_waiting"] == 0
    assert server.stop() == 0


def test_a_short_queue_refuses_the_rest_at_once(start_server: Callable[..., ServerProcess], alone: list[str]) -> None:
    server = start_server("--max-model-len", "512", "--max-queue", "50")

    responses = all_at_once(server)

    refused = [response for response in responses if response.status_code == 429]
    accepted = [response for response in responses if response.status_code == 200]
    assert len(refused) + len(accepted) == CROWD
    assert len(accepted) >= 32 + 50
    assert refused
    for response in refused:
        assert response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
    assert_texts(responses, alone)
    counted = metrics(server)
    assert counted['trm_request_rejected_total{reason="overloaded"}'] == len(refused)
    assert counted["trm_num_requests_running"] == counted["trm_num_requests_waiting"] == 0
    assert server.stop() == 0
