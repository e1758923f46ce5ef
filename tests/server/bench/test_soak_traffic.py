"""What the soak's clients make of answers, and that they see through whatever a server does."""

import asyncio
import contextlib
import itertools
import json
import random
import time

import pytest

from server.bench.soak import traffic
from server.bench.soak.connection import Head
from server.bench.soak.traffic import CHAT, SOLVE, Clients, Draw, Errand, Leaving, judge

JSON_HEAD = Head(200, {"content-type": "application/json"})
BODY = {"messages": [{"role": "user", "content": "How many?"}], "max_tokens": 4}
ERRAND = Errand("chat", CHAT, BODY)
STREAM = Errand("chat", CHAT, BODY | {"stream": True})


def reply(*texts, finish="stop", tokens=3):
    choices = [{"message": {"content": text}, "finish_reason": finish} for text in texts]
    return json.dumps({"choices": choices, "usage": {"completion_tokens": tokens}}).encode()


def error(code, kind="invalid_request_error"):
    return json.dumps({"error": {"message": "no", "type": kind, "param": None, "code": code}}).encode()


def events(*contents, done=True):
    lines = [b"data: " + json.dumps(content).encode() for content in contents]
    return b"".join(line + b"\n\n" for line in (*lines, *([b"data: [DONE]"] if done else [])))


def delta(text, finish=None, index=0):
    return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish}]}


def test_answers_and_their_texts():
    assert judge(ERRAND, JSON_HEAD, reply("six"))[:2] == ("answered", "")
    assert judge(ERRAND, JSON_HEAD, reply("six"))[2].texts == ("six",)

    whole = b": keep-alive\n\n" + events(delta(""), delta("si"), delta("x"), delta("", "length"))
    outcome, why, told = judge(STREAM, Head(200, {}), whole)
    assert (outcome, why, told.texts, told.finishes, told.tokens) == ("answered", "", ("six",), ("length",), None)


def test_answers_of_solve():
    result = {"solution": "six", "finish_reason": "stop", "usage": {"completion_tokens": 8}}
    votes = Errand("votes", SOLVE, {"question": "?", "n": 3, "max_tokens": 4})
    assert judge(votes, JSON_HEAD, json.dumps(result).encode())[0] == "answered"

    two = Errand("two", SOLVE, {"question": ["?", "!"], "max_tokens": 8, "stream": True}, count=2)
    told = events({"type": "text"}, {"type": "result", "index": 1, "result": result | {"solution": "two"}})
    first = events({"type": "result", "index": 0, "result": result})
    outcome, _, both = judge(two, Head(200, {}), told.removesuffix(b"data: [DONE]\n\n") + first)
    assert (outcome, both.texts) == ("answered", ("six", "two"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (reply(), "0 texts instead of 1"),
        (reply("six", finish="cancelled"), "finish reasons {'cancelled'}"),
        (reply("six", tokens=5), "5 tokens, at most 4 were asked for"),
        (reply("six", tokens=0), "0 tokens"),
    ],
    ids=["no text", "cancelled", "too long", "empty"],
)
def test_an_answer_that_is_not_what_was_asked_for_fails(content, why):
    outcome, said, _ = judge(ERRAND, JSON_HEAD, content)

    assert outcome == "failed"
    assert why in said


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (events(delta("six", "stop"), done=False), "the stream ended in"),
        (events(delta("six"), json.loads(error("draining"))), "told of an error"),
        (events(delta("six", "stop"), delta("more")), "went on after its end"),
    ],
    ids=["no end", "error", "after its end"],
)
def test_a_stream_that_breaks_raises(content, why):
    with pytest.raises(ValueError, match=why):
        judge(STREAM, Head(200, {}), content)


def test_a_stream_without_a_finish_reason_fails():
    assert judge(STREAM, Head(200, {}), events(delta("six")))[:2] == ("failed", "finish reasons {None}")


def test_a_text_must_obey_its_grammar_once_it_is_whole():
    errand = Errand("grammar", CHAT, BODY, accept=lambda text: text in ("yes", "no"))

    assert judge(errand, JSON_HEAD, reply("yes"))[0] == "answered"
    assert judge(errand, JSON_HEAD, reply("perhaps"))[0] == "failed"
    assert judge(errand, JSON_HEAD, reply("ye", finish="length"))[0] == "answered"


def test_refusals_are_as_they_should_be_or_failures():
    full = Head(429, {"retry-after": "1"})
    assert judge(ERRAND, full, error("queue_full"))[:2] == ("refused", "overloaded")
    assert judge(ERRAND, Head(429, {"retry-after": "0"}), error("queue_full"))[0] == "failed"
    assert judge(ERRAND, full, error("other"))[0] == "failed"
    assert judge(Errand("look", "/tokenize", {}), full, error("queue_full"))[0] == "failed", "it takes no place"

    bad = Errand("bad", CHAT, BODY, due=400)
    assert judge(bad, Head(400, {}), error(None))[:2] == ("refused", "invalid")
    assert judge(bad, Head(404, {}), error("model_not_found"))[0] == "failed"
    assert judge(bad, JSON_HEAD, reply("six"))[0] == "failed", "it should have been refused"
    assert judge(ERRAND, Head(503, {}), error("draining"))[0] == "failed"


def against(answer, *errands):
    """The records of errands, each on a connection of its own, at a server that writes `answer` and hangs up."""
    serving = []

    async def serve(reader, writer):
        serving.append(asyncio.current_task())
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def run():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            clients = Clients(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            for errand in errands:
                await clients.once(errand)
            await asyncio.gather(*serving)
            assert clients.connections == 0
            return clients.records

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "closed the connection before an answer"),
        (b"SSH-2.0\r\n\r\n", "the server said 'SSH-2.0'"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", "in the middle of an answer"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nda", "in the middle of an answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{]", "JSONDecodeError"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", "KeyError"),
    ],
    ids=["nothing", "no HTTP", "half a body", "half a chunk", "no JSON", "other JSON"],
)
def test_whatever_a_server_does_is_a_failure_with_a_reason(answer, why):
    (record,) = against(answer, ERRAND)

    assert record.outcome == "failed"
    assert why in record.why


def test_a_server_that_says_nothing_is_left_in_the_end(monkeypatch):
    monkeypatch.setattr(traffic, "PATIENCE_S", 0.1)

    (record,) = against(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n", Errand("chat", CHAT, BODY, leaving=None))

    assert record.outcome == "failed"


def test_clients_that_leave_have_left_unless_they_see_a_refusal():
    content = error("queue_full")
    full = b"HTTP/1.1 429 Full\r\nretry-after: 1\r\ncontent-length: %d\r\n\r\n%s" % (len(content), content)
    ways = (Leaving(share=0.0), Leaving(share=0.5), Leaving(cut_off=True), Leaving(pieces=1))

    records = against(full, *(Errand("leaves", CHAT, BODY, leaving=way) for way in ways))

    assert [(record.outcome, record.why) for record in records] == [("left", "")] * 3 + [("refused", "overloaded")]


def test_the_same_seed_draws_the_same_errands_of_every_kind():
    def drawn():
        draw = Draw(random.Random(1), 1024, 16)
        return [errand.message("http://localhost") for errand in (*(draw() for _ in range(500)), *draw.burst(3))]

    assert drawn() == drawn()
    draw = Draw(random.Random(1), 1024, 16)
    assert {draw().kind for _ in range(500)} == set(draw.kinds)


class Keeping(random.Random):
    """Never takes a new connection for the sake of it."""

    def random(self):
        return 1.0


def test_a_client_keeps_its_connection_but_never_an_idle_one(monkeypatch):
    """Whoever takes their time on another connection would come back to one that the server has closed meanwhile."""
    monkeypatch.setattr(traffic, "SLOW_READ_S", 0)
    look = Errand("look", "/health", method="GET")
    errands = itertools.cycle([look, look, Errand("slow", "/version", method="GET", slow=True), look])
    serving, open_during_slow = [], []

    async def serve(reader, writer):
        serving.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"/version" in head:
                    open_during_slow.append(clients.connections)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    async def run():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            clients.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            clients.began = time.perf_counter()
            await clients.work(lambda: next(errands), clients.began + 0.2, Keeping())
            await asyncio.gather(*serving)

    clients = Clients("")
    asyncio.run(run())

    assert {record.outcome for record in clients.records} == {"answered"}
    assert set(open_during_slow) == {1}
    assert 2 * len(open_during_slow) <= len(serving) <= 1 + 2 * len(open_during_slow), "quick ones share theirs"
