"""Waiting for what must come about. The limit is for what never does: no busy machine may reach it."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

LIMIT_S = 120


def wait_for(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Until something that another thread or process brings about."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


async def until(condition: Callable[[], object]) -> None:
    """The same, while this loop goes on."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.001)


def ask_and_leave(
    url: str, body: Mapping[str, Any], accepted: Callable[[], object], headers: Mapping[str, str] | None = None
) -> None:
    """A client that is gone as soon as its request has been accepted."""

    async def run() -> None:
        async with httpx.AsyncClient(headers=headers, timeout=LIMIT_S) as client:
            asked = asyncio.create_task(client.post(url, json=body))
            await asyncio.to_thread(wait_for, accepted)
            assert asked.cancel(), "it had its reply"

    asyncio.run(run())
