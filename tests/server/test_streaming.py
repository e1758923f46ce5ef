"""Server-sent events: what is sent while nothing happens."""

import asyncio

import pytest

from server.streaming import EventStream

pytestmark = pytest.mark.anyio

COMMENT = b": keep-alive\n\n"


class Wire:
    """The sending side of an ASGI server, whose client reads `reads` messages before it stops for a while."""

    def __init__(self, reads=1000):
        self.messages = []
        self.reads = asyncio.Semaphore(reads)

    async def __call__(self, message):
        self.messages.append(message)
        await self.reads.acquire()

    @property
    def bodies(self):
        return [message["body"] for message in self.messages[1:]]

    async def until(self, condition):
        async with asyncio.timeout(5):
            while not condition(self.bodies):
                await asyncio.sleep(0.001)


async def test_a_stream_that_waits_sends_comments(caplog):
    go_on = asyncio.Event()

    async def events():
        await go_on.wait()
        yield {"a": 1}
        go_on.clear()
        await go_on.wait()
        yield {"a": 2}

    wire = Wire()
    sending = asyncio.ensure_future(EventStream(events(), "test", keep_alive_s=0.01).stream_response(wire))
    await wire.until(lambda bodies: bodies == [COMMENT] * 2)
    go_on.set()
    await wire.until(lambda bodies: bodies[-2:] == [b'data: {"a":1}\n\n', COMMENT])
    go_on.set()
    await sending

    assert wire.messages[0]["type"] == "http.response.start"
    assert wire.bodies[-3:] == [b'data: {"a":2}\n\n', b"data: [DONE]\n\n", b""]
    assert [body for body in wire.bodies if body != COMMENT][:2] == [b'data: {"a":1}\n\n', b'data: {"a":2}\n\n']


async def test_a_stream_that_does_not_wait_sends_none():
    async def events():
        for number in range(12):
            await asyncio.sleep(0.05)
            yield {"a": number}

    wire = Wire()
    await EventStream(events(), "test", keep_alive_s=0.5).stream_response(wire)

    assert COMMENT not in wire.bodies
    assert len(wire.bodies) == 14


async def test_nothing_is_sent_to_a_client_that_does_not_read_nor_after_the_end():
    async def events():
        yield {"a": 1}

    wire = Wire(reads=0)
    sending = asyncio.ensure_future(EventStream(events(), "test", keep_alive_s=0.001).stream_response(wire))
    for count in range(1, 5):  # the start, the event, [DONE], the end: each waits for the client
        async with asyncio.timeout(5):
            while len(wire.messages) < count:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert len(wire.messages) == count
        wire.reads.release()
    await sending

    assert COMMENT not in wire.bodies


async def test_the_clock_ends_with_a_stream_that_is_cancelled():
    async def events():
        await asyncio.Event().wait()
        yield {}

    before = asyncio.all_tasks()
    wire = Wire()
    sending = asyncio.ensure_future(EventStream(events(), "test", keep_alive_s=0.001).stream_response(wire))
    await wire.until(bool)
    sending.cancel()
    await asyncio.wait([sending])
    await asyncio.sleep(0)

    assert asyncio.all_tasks() == before
