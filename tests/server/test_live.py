"""The app behind real sockets: OpenAI's own client, a closed connection, an orderly stop."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest

from server.cli import listen
from server.draining import DrainingServer
from server.http_protocol import MAX_HEAD_BYTES
from server.settings import ServeSettings
from tests.waiting import ask_and_leave, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def start(engine):
    """Serve an app in a thread; gives its url, how to signal it, and the thread."""
    threads = []

    def run(app, **settings):
        sock = listen("127.0.0.1", 0)
        server = DrainingServer(app, ServeSettings(**{"drain_seconds": 10, **settings}))
        loops = []

        async def serve():
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[sock])

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        thread.start()
        assert httpx.get(f"{url}/health").status_code == 200  # early clients queue on the socket

        stops = []

        def stop():
            if not stops and thread.is_alive():  # a second signal would exit
                stops.append(loops[0].call_soon_threadsafe(server.handle_exit, signal.SIGTERM, None))

        threads.append((thread, stop))
        return SimpleNamespace(url=url, stop=stop, thread=thread, server=server)

    yield run
    engine.release()
    for thread, stop in threads:
        stop()
        thread.join(10)
        assert not thread.is_alive()


def test_openais_client_gets_replies_streams_and_errors(start, make_app):
    live = start(make_app(api_key=["key"]))
    messages = [{"role": "user", "content": "2+2?"}]

    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="key", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["test/model"]
        reply = client.chat.completions.create(
            model="test/model",
            messages=messages,
            n=2,
            presence_penalty=1,
            logit_bias={"42": -100},
            extra_body={"top_k": 3, "halt_tolerance": 0.1},
        )
        chunks = list(
            client.chat.completions.create(
                model="test/model", messages=messages, stream=True, stream_options={"include_usage": True}
            )
        )
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="test/model", messages=messages, presence_penalty=3)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()

    assert [choice.message.content for choice in reply.choices] == ["so \\boxed{72}"] * 2
    assert [choice.boxed_answer for choice in reply.choices] == ["72"] * 2
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "so \\boxed{72}"
    assert chunks[-2].choices[0].boxed_answer == "72"
    assert chunks[-1].usage.completion_tokens == 3
    assert refused.value.param == "presence_penalty"


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_cancels_the_rows(start, app, engine, chat_body, stream):
    live = start(app)
    engine.hold()

    ask_and_leave(f"{live.url}/v1/chat/completions", chat_body(n=2, stream=stream), lambda: len(engine.handles) == 2)

    wait_for(lambda: all(handle.cancelled for handle in engine.handles))


def test_tokens_arrive_one_by_one(start, app, engine, chat_body, say):
    live = start(app)

    def script(request):
        yield from say("a")(request)[:1]
        engine.hold()  # after the event that comes next
        yield from say("b")(request)

    engine.script = script
    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=chat_body(stream=True)) as response:
        lines = response.iter_lines()
        seen = []
        while "b" not in seen:
            line = next(lines)
            if line:
                seen.append(json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content"))
        engine.release()  # the reply was not at its end when its second token arrived
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert seen == ["", "a", "b"]


def test_a_stream_that_waits_for_its_first_token_is_kept_alive(start, make_app, engine, chat_body):
    live = start(make_app(keep_alive_seconds=0.05))
    engine.hold()
    body = chat_body(stream=True)

    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        waited = [next(lines) for _ in range(4)]
        engine.release()
        rest = [line for line in lines if line and not line.startswith(":")]

    assert waited == [": keep-alive", ""] * 2
    assert json.loads(rest[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
    assert rest[-1] == "data: [DONE]"


def test_a_stopping_server_finishes_accepted_work_and_refuses_new(start, app, engine, chat_body):
    live = start(app)
    engine.hold()
    replies = []
    url = f"{live.url}/v1/chat/completions"
    accepted = threading.Thread(target=lambda: replies.append(httpx.post(url, json=chat_body())))
    accepted.start()
    wait_for(lambda: engine.handles)

    live.stop()
    wait_for(lambda: app.state.serving.worker.draining)
    assert httpx.get(f"{live.url}/ready").status_code == 503
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert httpx.post(url, json=chat_body()).status_code == 503
    engine.release()
    accepted.join(5)
    live.thread.join(5)

    assert replies[0].status_code == 200
    assert not live.thread.is_alive()


HALF = {
    "nothing": b"",
    "half a head": b"GET /health HTTP/1.1\r\nHost: te",
    "a request, then half a head": b"GET /health HTTP/1.1\r\nHost: test\r\n\r\nGET /he",
}


@pytest.mark.parametrize("sent", HALF.values(), ids=HALF)
def test_connections_without_a_whole_request_are_closed(start, app, sent):
    live = start(app, idle_connection_seconds=1)

    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(sent)
        answer = b"".join(iter(lambda: connection.recv(1000), b""))  # until the server closes it

    assert answer.startswith(b"HTTP/1.1 200") == sent.startswith(b"GET /health HTTP/1.1\r\nHost: test\r\n")


HEADS = {
    "not HTTP": (b"sesame open\r\n\r\n", 400),
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "no Host in HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", 200),
    "one line that never ends": (b"GET /" + b"x" * 20 * MAX_HEAD_BYTES, 431),
    "one large header": (b"GET /health HTTP/1.1\r\nHost: test\r\nX: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
    "headers that never end": (b"GET /health HTTP/1.1\r\n" + b"Name: value\r\n" * MAX_HEAD_BYTES, 431),
    "much, but not too much": (b"GET /health HTTP/1.1\r\nHost: test\r\n" + b"Name: value\r\n" * 4000 + b"\r\n", 200),
}


@pytest.mark.parametrize(("sent", "status"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", [1000, 10**7], ids=["in pieces", "at once"])
def test_heads_are_bounded_and_refusals_in_shape(start, app, sent, status, size):
    live = start(app, idle_connection_seconds=1)

    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):  # it answers before it has read all
            for start_at in range(0, len(sent), size):
                connection.sendall(sent[start_at : start_at + size])
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1000):
                received += piece
    head, _, body = received.partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 %d " % status)
    if status != 200:
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
    metrics = httpx.get(f"{live.url}/metrics").text
    for counted, reason in ((400, "invalid"), (431, "head_too_large")):
        assert f'trm_request_rejected_total{{reason="{reason}"}} {float(status == counted)}' in metrics


def talk(live, *pieces, pause_s=0.0):
    """Everything the server says to these bytes, sent piece by piece, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            threading.Event().wait(pause_s)
        received = b""
        while said := connection.recv(2**16):
            received += said
        return received


def statuses(said):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]


@pytest.mark.parametrize("offer", [b"h2c", b"TLS/1.2", b"foo", b"websocket", b"h2c, foo"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("pause_s", [0.0, 0.1], ids=["at once", "a moment later"])
def test_an_offered_upgrade_is_ignored_and_the_body_read(start, app, engine, offer, framing, pause_s):
    live = start(app, idle_connection_seconds=1)
    body = json.dumps({"question": "What is 1 + 1?"}).encode()
    head = (
        b"POST /solve HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    )
    head += b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + offer + b"\r\nSec-WebSocket-Key: YQ==\r\n"
    if framing == "length":
        pieces = [head + b"Content-Length: %d\r\n\r\n" % len(body), body[:9], body[9:]]
    else:
        pieces = [head + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%s\r\n" % (len(body), body), b"0\r\n\r\n"]
    then = b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"

    said = talk(live, *(pieces if pause_s else [b"".join(pieces)]), then, pause_s=pause_s)

    assert statuses(said) == [200, 200]
    assert [messages[-1]["content"] for messages in engine.chat.conversations] == ["What is 1 + 1?"]


@pytest.mark.parametrize("pause_s", [0.0, 0.1], ids=["at once", "a moment later"])
def test_the_body_behind_an_offered_upgrade_is_no_request(start, app, engine, pause_s):
    live = start(app, idle_connection_seconds=1)
    inner = b"GET /version HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    head = b"POST /solve HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nConnection: upgrade\r\n"
    head += b"Upgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(inner)

    said = talk(live, *([head, inner] if pause_s else [head + inner]), pause_s=pause_s)

    assert statuses(said) == [400]
    assert b"not valid JSON" in said


def test_upgrades_without_a_body_and_many_at_once(start, app):
    live = start(app, idle_connection_seconds=1)
    offer = b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"

    assert statuses(talk(live, offer * 1500)) == [200] * 1500, "as many as a read brings"
    assert statuses(talk(live, b"CONNECT test:443 HTTP/1.1\r\nHost: test\r\n\r\n")) == [400]


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_no_chunks_and_a_closed_connection(start, app, engine, chat_body, say, stream):
    engine.script = say("one ", "two ", "three")
    live = start(app, idle_connection_seconds=5)
    body = json.dumps(chat_body(stream=stream)).encode()
    head = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\nConnection: keep-alive\r\n"

    head, _, reply = talk(live, head + b"Content-Length: %d\r\n\r\n" % len(body) + body).partition(b"\r\n\r\n")

    assert statuses(head) == [200]
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert (b"content-length" in head.lower()) == (not stream)
    if stream:
        assert reply.startswith(b"data: {")
        assert reply.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(reply)["choices"][0]["message"]["content"] == "one two three"


def test_head_is_get_without_its_body(start, app):
    live = start(app)
    for path in (
        "/",
        "/health",
        "/ready",
        "/version",
        "/v1/models",
        "/metrics",
        "/openapi.json",
        "/playground/main.js",
    ):
        head, get = httpx.head(live.url + path), httpx.get(live.url + path)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert head.headers["content-type"] == get.headers["content-type"]
        if path != "/metrics":  # which counts
            assert head.headers["content-length"] == str(len(get.content)), path
    assert httpx.head(f"{live.url}/solve").status_code == 405
    said = talk(live, b"HEAD /version HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
    assert said.partition(b"\r\n\r\n")[2] == b""


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_do_not_read_are_left(start, app, engine, chat_body, say, stream):
    """The reply is larger than what kernels keep; one that reads it late or slowly, but reads, gets it whole."""
    engine.script = say(*["x" * 100_000] * 160)
    live = start(app, idle_connection_seconds=1)
    body = json.dumps(chat_body(stream=stream)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    request = head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    def said(pause_s, pieces=1):
        with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=10) as connection:
            connection.sendall(request)
            wait_for(lambda: engine.handles and engine.handles[-1].ended)
            size = 0
            try:
                for _ in range(pieces):
                    size += len(connection.recv(30_000))
                    threading.Event().wait(pause_s)
                while received := connection.recv(2**20):
                    size += len(received)
            except ConnectionResetError:
                pass
            return size

    assert said(pause_s=0.2) > 16_000_000
    assert said(pause_s=0.1, pieces=40) > 16_000_000
    assert said(pause_s=4) < 16_000_000
    wait_for(lambda: not live.server.server_state.connections)


def test_connections_that_wait_for_their_reply_are_not_idle(start, app, engine, chat_body):
    live = start(app, idle_connection_seconds=1)
    engine.hold()
    release = threading.Timer(3.5, engine.release)
    release.start()

    assert httpx.post(f"{live.url}/v1/chat/completions", json=chat_body(), timeout=10).status_code == 200


def test_who_waits_for_an_engine_that_hangs_is_told(start, app, engine, chat_body):
    live = start(app)
    engine.hold()
    threading.Timer(0.5, lambda: setattr(engine, "dead", True)).start()

    response = httpx.post(f"{live.url}/v1/chat/completions", json=chat_body(), timeout=10)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "device_failed")
    assert httpx.get(f"{live.url}/health").status_code == 503

    engine.dead = False
    engine.release()
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert httpx.post(f"{live.url}/v1/chat/completions", json=chat_body(), timeout=10).status_code == 200


@pytest.mark.parametrize("exits", [False, True], ids=["stays", "exits"])
def test_an_engine_that_died_ends_the_server_if_told_so(start, app, engine, exits):
    live = start(app, exit_on_failure=exits)

    engine.dead = True
    live.thread.join(30 if exits else 1)

    assert live.thread.is_alive() != exits
    assert live.server.engine_failed == exits
