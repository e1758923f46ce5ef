"""Traffic that accounts for itself: each request is answered, told why not, or lost.

Answered: the whole reply came. Told: an error in our shape, or a connection that ended with less than was promised, so
that the client knows. Lost: neither within a minute. What is answered must be what the reference decodes.
"""

import itertools
import json
import threading
import uuid
from collections import Counter
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from server.bench.soak.canaries import NEAR_TIE
from tests.e2e.near_tie import bundled
from tests.waiting import wait_for
from trm import reference
from trm.chat import solve_messages
from trm.engine import SamplingParams

QUESTIONS = (
    "Tom has 12 apples. He buys 7 more. How many apples does he have now?",
    "Ann has 9 eggs and eats 4. How many are left?",
    "Each box holds 6 pencils. Mia has 4 boxes. How many pencils does she have?",
    "2 pens cost $3 each. How much is it?",
    "Tom has 12 apples. He buys 7 more and gives 5 to Anna. How many apples does he have left?",
    "Leo shares 20 cards equally among 5 friends. How many cards does each friend get?",
)
MAX_TOKENS, EFFORT = 40, 1
PATIENCE_S = 60
TOLD_PAUSE_S = 0.05  # of a client that was told to go away


@cache
def expected(question: str) -> str:
    """What the reference decodes, far from any near tie: so there is nothing else that a server may say."""
    model, chat = bundled()
    params = SamplingParams(max_tokens=MAX_TOKENS, n_supervision=EFFORT)
    reply = reference.decode(model, chat.encode(solve_messages(question)), params, chat.end_id)
    assert min(reply.gaps) > NEAR_TIE
    return chat.decode(reply.token_ids)


@dataclass(frozen=True)
class Outcome:
    """What became of one request; `detail` is the kind of reply, an error's code or an exception's name."""

    id: str
    question: str
    kind: Literal["answered", "told", "lost"]
    detail: str
    text: str = ""


def ask(client: httpx.Client, question: str, stream: bool, id_: str | None = None) -> Outcome:
    """Send one chat request, and wait for what becomes of it."""
    id_ = id_ or uuid.uuid4().hex
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": MAX_TOKENS, "supervision_steps": EFFORT, "stream": stream}
    try:
        response = client.post("/v1/chat/completions", json=body, headers={"X-Request-Id": id_})
        if not response.is_success:
            return Outcome(id_, question, "told", f"{response.status_code} {response.json()['error']['code']}")
        assert response.headers["x-request-id"] == id_
        if stream:
            return _streamed(id_, question, response.text)
        return Outcome(id_, question, "answered", "reply", response.json()["choices"][0]["message"]["content"])
    except httpx.TimeoutException:
        return Outcome(id_, question, "lost", "nothing came")
    except httpx.TransportError as error:  # chunks without an end are one too
        return Outcome(id_, question, "told", type(error).__name__)


def _streamed(id_: str, question: str, events: str) -> Outcome:
    *contents, done = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    if done != "[DONE]":
        return Outcome(id_, question, "lost", "a stream that ended without its end")
    chunks: list[dict[str, Any]] = [json.loads(content) for content in contents]
    if "error" in chunks[-1]:
        return Outcome(id_, question, "told", f"stream {chunks[-1]['error']['code']}")
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[-1]["finish_reason"] == "stop"
    return Outcome(id_, question, "answered", "stream", "".join(c["delta"].get("content") or "" for c in choices))


class Traffic:
    """Clients that ask one thing after the other, half of them streamed, from `with` until its end."""

    def __init__(self, url: str, clients: int = 8, pause_s: float = 0) -> None:
        self.outcomes: list[Outcome] = []
        self.sent = 0
        self._url = url
        self._pause_s = pause_s
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._failures: list[Exception] = []
        self._threads = [threading.Thread(target=self._visit) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)
        if error is None:
            assert not self._failures, self._failures[0]

    def _visit(self) -> None:
        try:
            with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as client:
                while not self._over.is_set():
                    with self._lock:
                        turn = next(self._turn)
                        self.sent += 1
                    outcome = ask(client, QUESTIONS[turn % len(QUESTIONS)], stream=turn // len(QUESTIONS) % 2 == 1)
                    with self._lock:
                        self.outcomes.append(outcome)
                    self._over.wait(self._pause_s if outcome.kind == "answered" else TOLD_PAUSE_S)
        except Exception as failure:
            self._failures.append(failure)
            raise

    def count(self, kind: str) -> int:
        """How many have come to such an end so far."""
        with self._lock:
            return sum(outcome.kind == kind for outcome in self.outcomes)

    def until_answered(self, more: int) -> None:
        """Let it flow until so many more are answered."""
        goal = self.count("answered") + more
        wait_for(lambda: self.count("answered") >= goal)

    def account(self) -> Counter[str]:
        """How many of the requests came to which end. Nothing is lost, and all that was answered is right."""
        table = Counter(f"{outcome.kind}: {outcome.detail}" for outcome in self.outcomes)
        assert table.total() == self.sent, table
        assert not [outcome for outcome in self.outcomes if outcome.kind == "lost"], table
        wrong = [o for o in self.outcomes if o.kind == "answered" and o.text != expected(o.question)]
        assert not wrong, wrong[0]
        return table
