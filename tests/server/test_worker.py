"""The bridge between loop and engine thread, and what happens when a client or the server leaves."""

import asyncio
import inspect
import logging
import threading

import pytest

from server.errors import TimedOut, Unavailable
from server.metrics import Metrics
from server.worker import Worker
from tests.waiting import until
from trm.engine.engine import Engine
from trm.engine.request import Event, Request, SamplingParams
from trm.errors import BadRequest, DeviceError, Overloaded

pytestmark = pytest.mark.anyio


def requests(n=1):
    return [Request((1, 2, 3), SamplingParams(sample_index=index)) for index in range(n)]


def submit(worker, requests):
    submission = worker.reserve(len(requests), "model")
    worker.submit(submission, requests)
    return submission


@pytest.fixture
def worker(engine):
    return Worker(engine, Metrics())


def test_the_fake_has_the_engines_interface(engine):
    for name in ("reserve", "submit", "alive", "stats"):
        real = inspect.signature(getattr(Engine, name)).parameters
        assert list(real)[1:] == list(inspect.signature(getattr(engine, name)).parameters)


async def test_events_come_in_order_on_the_loops_thread(worker, engine):
    submission = submit(worker, requests(2))
    seen = {0: "", 1: ""}

    async for index, event in submission:
        assert threading.current_thread() is threading.main_thread()
        seen[index] += event.text

    assert seen == {0: "so \\boxed{72}", 1: "so \\boxed{72}"}
    assert (submission.prompt_tokens, submission.completion_tokens) == (6, 6)
    assert not submission.running


async def test_whole_replies_come_in_order_of_submission(worker, engine, say):
    engine.script = lambda request: say(*"abcd"[request.params.sample_index :])(request)

    replies = await submit(worker, requests(4)).replies()

    assert [reply.text for reply in replies] == ["abcd", "bcd", "cd", "d"]
    assert [reply.token_ids for reply in replies][-1] == (10, 0)


@pytest.mark.parametrize("error", [Overloaded("full"), BadRequest("too long", param="messages")], ids=repr)
async def test_what_the_engine_refuses_is_raised(worker, engine, error):
    engine.refuse = error

    with pytest.raises(type(error)):
        submit(worker, requests())
    await worker.drain(0)  # nothing is under way


async def test_a_reserved_place_is_work_under_way_and_ends_with_its_caller(worker, engine):
    first, second = worker.reserve(2, "model"), worker.reserve(1, "model")
    drain = asyncio.create_task(worker.drain(10))
    await until(lambda: worker.draining)
    assert engine.reserved == 3

    second.cancel()
    second.cancel()
    assert not second.running
    worker.submit(first, requests(2))
    await first.replies()

    await drain
    assert engine.reserved == 0


async def test_whoever_is_late_with_the_requests_learns_why_the_place_is_gone(worker, engine):
    late = worker.reserve(1, "model")
    await worker.drain(0)

    with pytest.raises(Unavailable, match="stopping"):
        worker.submit(late, requests())
    assert engine.reserved == 0


async def test_requests_that_take_too_long_are_ended(engine):
    worker = Worker(engine, Metrics(), timeout_s=0.05)
    engine.hold()
    submission, late = submit(worker, requests(2)), worker.reserve(1, "model")

    with pytest.raises(TimedOut, match=r"longer than 0\.05 s"):
        await submission.replies()
    assert all(handle.cancelled for handle in engine.handles)
    await until(lambda: late.error)
    with pytest.raises(TimedOut):
        worker.submit(late, requests())
    await worker.drain(5)  # nothing is left
    assert engine.reserved == 0


async def test_a_request_whose_tokenising_hangs_is_ended_too(engine, make_app, connect, chat_body):
    hangs = threading.Event()
    engine.chat.encode = lambda messages, **_: [int(hangs.wait(10))]

    async with connect(make_app(request_timeout_seconds=0.1)) as client:
        response = await client.post("/v1/chat/completions", json=chat_body())
        hung = not hangs.is_set()
        hangs.set()

    assert hung
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert "0.1 s, this server's limit (--request-timeout-seconds)" in response.json()["error"]["message"]
    assert not engine.requests
    assert not engine.reserved


async def test_a_timeout_leaves_what_ended_in_time_alone(engine):
    worker = Worker(engine, Metrics(), timeout_s=0.05)

    replies = await submit(worker, requests(2)).replies()
    await asyncio.sleep(0.1)

    assert [reply.finish_reason for reply in replies] == ["stop", "stop"]
    assert not any(handle.cancelled for handle in engine.handles)


async def test_events_of_one_step_wake_the_loop_once(worker, engine, monkeypatch, say):
    """Each wake-up costs the loop's lock and a system call, for every token of every row."""
    loop = asyncio.get_running_loop()
    wake_ups = []
    wake = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (wake_ups.append(1), wake(*args)))
    engine.script = say(*"abcdefgh")
    submission = submit(worker, requests(4))
    engine.join()  # the loop is not free to look before everything has come

    assert len(wake_ups) == 1
    assert [reply.text for reply in await submission.replies()] == ["abcdefgh"] * 4


async def test_an_engine_that_died_meanwhile_is_unavailable(worker, engine):
    engine.refuse = DeviceError("the engine is shut down")

    with pytest.raises(Unavailable, match="shut down"):
        submit(worker, requests())


async def test_a_failed_request_raises_its_error(worker, engine):
    engine.script = lambda request: [Event(finish_reason="error", error=DeviceError("not finite"))]

    with pytest.raises(DeviceError, match="not finite"):
        await submit(worker, requests()).replies()


async def test_cancel_reaches_only_what_has_not_ended(worker, engine, say):
    def script(request):
        *events, last = say("a")(request)
        yield from events
        engine.hold()  # the first to get here ends, the other does not
        yield last

    engine.script = script
    submission = submit(worker, requests(2))
    await until(lambda: submission.completion_tokens == 3)

    submission.cancel()
    await until(lambda: not submission.running)

    assert [handle.cancelled for handle in engine.handles] == [False, True]


async def test_a_spared_request_ends_and_the_others_go_on(worker, engine):
    engine.hold()
    submission = submit(worker, requests(3))

    submission.spare([1])
    await until(lambda: engine.handles[1].ended)
    engine.release()
    replies = await submission.replies()

    assert [reply.finish_reason for reply in replies] == ["stop", "cancelled", "stop"]
    assert [handle.cancelled for handle in engine.handles] == [False, True, False]


async def test_draining_waits_for_accepted_work_and_takes_no_more(worker, engine):
    engine.hold()
    submission = submit(worker, requests())
    drain = asyncio.create_task(worker.drain(10))
    await until(lambda: worker.draining)

    with pytest.raises(Unavailable):
        submit(worker, requests())
    engine.release()
    await drain

    assert [reply.finish_reason for reply in await submission.replies()] == ["stop"]


async def test_draining_cancels_what_takes_too_long(worker, engine):
    engine.hold()
    submission = submit(worker, requests(2))

    await worker.drain(0.01)

    with pytest.raises(Unavailable):
        await submission.replies()
    assert all(handle.cancelled for handle in engine.handles)


async def test_events_after_the_loop_has_closed_do_not_hurt_the_engine(engine, recwarn):
    engine.hold()
    loop = asyncio.new_event_loop()

    async def leave_open():
        submit(Worker(engine, Metrics()), requests())

    await asyncio.to_thread(loop.run_until_complete, leave_open())
    loop.close()
    engine.release()

    engine.join()  # an exception in the fake's thread would be a warning, and warnings are errors


# Leaving clients, at the level where servers tell of them


@pytest.fixture
def leave(app):
    """Run a request whose client leaves when told to; returns what was sent to it."""

    async def run(path, body, gone: asyncio.Event, body_arrives=True):
        sent = []
        messages = [{"type": "http.request", "body": body, "more_body": not body_arrives}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await app({**scope, "asgi": {"version": "3.0"}}, receive, send)
        return sent

    return run


def departures(app):
    return app.state.metrics.registry.get_sample_value("trm_client_disconnects_total")


BODIES = {
    "plain": ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "n": 2}'),
    "stream": ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "n": 2, "stream": true}'),
    "solve": ("/solve", b'{"question": "a", "n": 2}'),
}


@pytest.mark.parametrize("kind", BODIES)
async def test_a_client_that_leaves_takes_its_rows_along(leave, app, engine, kind):
    engine.hold()
    gone = asyncio.Event()
    request = asyncio.create_task(leave(*BODIES[kind], gone))
    await until(lambda: len(engine.handles) == 2)

    gone.set()
    sent = await request

    assert all(handle.cancelled for handle in engine.handles)
    assert departures(app) == 1
    assert [message["type"] for message in sent] == (["http.response.start"] if kind == "stream" else [])
    engine.join()
    await app.state.serving.worker.drain(5)  # the final events have arrived: nothing leaks


@pytest.mark.parametrize("kind", BODIES)
async def test_a_client_that_leaves_leaves_no_task_behind(leave, engine, kind):
    engine.hold()
    before = asyncio.all_tasks()
    gone = asyncio.Event()
    requests = [asyncio.create_task(leave(*BODIES[kind], gone)) for _ in range(5)]
    await until(lambda: len(engine.handles) == 10)

    gone.set()
    await asyncio.gather(*requests)

    await until(lambda: asyncio.all_tasks() <= before)


async def test_a_client_that_leaves_in_mid_stream_takes_its_rows_along(leave, engine):
    def script(request):
        yield Event((1,), "a")
        engine.hold()
        yield Event((2,), "b")

    engine.script = script
    gone = asyncio.Event()
    request = asyncio.create_task(leave(*BODIES["stream"], gone))
    await until(lambda: len(engine.handles) == 2)
    gone.set()
    sent = await request

    assert all(handle.cancelled for handle in engine.handles)
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


async def test_a_client_that_leaves_while_sending_is_forgotten(leave, app, engine):
    gone = asyncio.Event()
    gone.set()

    assert await leave("/solve", b'{"question"', gone, body_arrives=False) == []
    assert not engine.requests
    assert departures(app) == 1


@pytest.mark.parametrize("kind", BODIES)
async def test_a_client_that_leaves_with_the_whole_response_has_not_left_early(app, engine, kind, caplog):
    """Servers tell of a disconnection then too."""
    caplog.set_level(logging.INFO)
    path, body = BODIES[kind]
    whole, messages = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if not messages:
            await whole.wait()
            return {"type": "http.disconnect"}
        return messages.pop()

    async def send(message):
        if message["type"] == "http.response.body" and not message.get("more_body"):
            whole.set()
            await asyncio.sleep(0)  # what waits for the disconnection gets to run

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    await app({**scope, "asgi": {"version": "3.0"}}, receive, send)

    assert departures(app) == 0
    assert [vars(record)["status"] for record in caplog.records if record.name == "server.middleware"] == [200]


async def test_a_server_told_to_cancel_its_handlers_cancels_the_rows(leave, engine):
    engine.hold()
    request = asyncio.create_task(leave(*BODIES["solve"], asyncio.Event()))
    await until(lambda: len(engine.handles) == 2)

    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request

    assert all(handle.cancelled for handle in engine.handles)


async def test_a_server_that_stops_tells_its_clients(client, app, engine):
    engine.hold()
    requests = [
        asyncio.create_task(client.post(path, content=body, headers={"content-type": "application/json"}))
        for path, body in BODIES.values()
    ]
    await until(lambda: len(engine.handles) == 6)

    await app.state.serving.worker.drain(0)

    plain, stream, solve = [await request for request in requests]
    assert (plain.status_code, solve.status_code) == (503, 503)
    assert plain.json()["error"]["code"] == "draining"
    assert '"code":"draining"' in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
