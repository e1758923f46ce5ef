"""What the benchmark's clients make of bytes and times."""

import asyncio
import json
import re

import pytest

from server.bench import clients


def chunk(text=None, usage=None):
    choices = [] if usage else [{"delta": {} if text is None else {"content": text}}]
    event = b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def test_times_are_those_of_the_bytes_that_complete_a_text():
    second = chunk(" two")
    pieces = [
        (10.0, b""),
        (11.0, HEAD + chunk("")),  # the role: no text yet
        (12.0, chunk("one") + second[:20]),
        (15.0, second[20:]),
        (15.5, chunk(" three") + chunk()),
        (16.0, chunk(usage={"completion_tokens": 4}) + END),
    ]

    assert clients.reply(pieces) == {"text": "one two three", "tokens": 4, "first_s": 2.0, "gaps_s": [3.0, 0.5]}


def run_against(answer, streams, bodies):
    """A run against a server that says `answer(body)`."""

    serving = []

    async def serve(reader, writer):
        serving.append(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"Content-Length: (\d+)", head)[1])
                said = answer(json.loads(await reader.readexactly(length)))
                writer.write(said)
                if not said:
                    break
        except (asyncio.IncompleteReadError, ConnectionResetError):
            pass
        writer.close()

    async def run():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            report = await clients.run("127.0.0.1", server.sockets[0].getsockname()[1], "/", streams, bodies)
            await asyncio.gather(*serving)
            return report

    return asyncio.run(run())


def test_streams_share_the_bodies_and_replies_keep_their_order():
    report = run_against(
        lambda body: HEAD + chunk(body["say"]) + chunk(usage={"completion_tokens": 1}) + END,
        2,
        [{"say": word} for word in "abcde"],
    )

    assert [reply["text"] for reply in report["replies"]] == list("abcde")
    assert all(0 < reply["first_s"] <= report["wall_s"] for reply in report["replies"])


def test_a_connection_that_is_closed_too_early_ends_the_run():
    with pytest.raises(ConnectionError, match="closed the connection"):
        run_against(lambda body: b"", 1, [{}])


def test_a_refusal_ends_the_run_with_the_servers_words():
    with pytest.raises(ConnectionError, match="429 Too Many Requests"):
        run_against(lambda body: b"HTTP/1.1 429 Too Many Requests\r\n\r\n", 1, [{}])
