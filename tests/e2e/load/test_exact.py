"""Promise P10 over HTTP: 32 chats at once give the bits that each gives alone, while the server stays alive.

`TEST_MODEL=DIR pytest tests/e2e/load/test_exact.py` asks a model of one's own instead of the bundled one.
"""

import asyncio
import os
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ServerProcess
from training.problems.synthetic import problems
from trm.device import has_fast_bfloat16
from trm.linear import has_int8

CROWD = 32
TIMEOUT_S = 500
ALIVE_S = 5.0  # /health and /metrics, on a machine that is busy with decoding
QUESTIONS = [problem.question for problem in problems(("have", "groups"), "heldout", seed=9, count=CROWD)]

pytestmark = pytest.mark.skipif(not has_fast_bfloat16("cpu"), reason="this processor has no bfloat16 products")


def body(index: int, stream: bool = False) -> dict[str, Any]:
    """Chats of mixed lengths, efforts and temperatures."""
    return {
        "messages": [{"role": "user", "content": QUESTIONS[index]}],
        "max_tokens": 8 + index % 5 * 4,
        "supervision_steps": index % 4,
        "temperature": index % 3 / 2,
        "top_p": 0.95,
        "seed": index,
        "logprobs": True,
        "top_logprobs": 3,
        "stream": stream,
    }


async def ask(client: httpx.AsyncClient, index: int) -> Any:
    """All numbers of a reply."""
    response = await client.post("/v1/chat/completions", json=body(index))
    response.raise_for_status()
    return response.json()["choices"]


async def streamed(client: httpx.AsyncClient, index: int) -> list[float]:
    """Seconds between the events of a stream."""
    times = [time.monotonic()]
    async with client.stream("POST", "/v1/chat/completions", json=body(index, stream=True)) as response:
        async for line in response.aiter_lines():
            if line:
                times.append(time.monotonic())
    return [after - before for before, after in pairwise(times)]


@pytest.mark.parametrize(
    "how",
    [
        ("--dtype", "bfloat16"),
        pytest.param(("--quantize", "int8"), marks=pytest.mark.skipif(not has_int8(), reason="no fast int8 products")),
    ],
)
def test_a_crowd_gets_the_bits_of_the_lonely(how: tuple[str, str], start_server: Callable[..., ServerProcess]) -> None:
    model = ["--model", os.environ["TEST_MODEL"]] if "TEST_MODEL" in os.environ else []
    server = start_server(*how, *model, "--max-model-len", "512", "--max-rows", "32")
    assert httpx.get(f"{server.url}/version").json()["exact"] is True

    async def run() -> tuple[list[Any], list[Any], list[float], list[float]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, limits=httpx.Limits()) as client:
            alone = [await ask(client, index) for index in range(CROWD)]
            asking = asyncio.gather(*(ask(client, index) for index in reversed(range(CROWD))))
            stream = asyncio.ensure_future(streamed(client, 0))
            alive = []
            while not asking.done():
                for path in ("/health", "/metrics"):
                    started = time.monotonic()
                    (await client.get(path)).raise_for_status()
                    alive.append(time.monotonic() - started)
                await asyncio.sleep(0.05)
            return alone, list(reversed(await asking)), alive, await stream

    alone, together, alive, gaps = asyncio.run(run())

    print(f"{len(alive)} looks at /health and /metrics: {max(alive):.3f} s at most; stream: {max(gaps):.3f} s")
    assert together == alone
    assert max(alive) < ALIVE_S
    assert len(gaps) > 2
