"""What an attacker can send, byte for byte: two requests in one, endless heads, paths to other files, secrets to log.

SECURITY.md has the whole list, and where the rest of it is tested.
"""

import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import httpx
import pytest

from tests.e2e.conftest import ServerProcess

KEY = "sesame-key"
LIMIT_S = 2  # of idle connections and of bodies
AUTHORIZED = f"Host: test\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json".encode()


@pytest.fixture(scope="module")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    limits = ("--idle-connection-seconds", str(LIMIT_S), "--body-timeout-seconds", str(LIMIT_S))
    public = ("--public-paths", "/", "/playground/*")
    return start_server("--api-key", KEY, *public, "--log-level", "debug", *limits)


def connect(server: ServerProcess) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 0), timeout=10)


def exchange(server: ServerProcess, *sent: bytes) -> bytes:
    """All that the server says until it closes the connection, which it does when it is idle, too."""
    with connect(server) as connection:
        said = b""
        try:
            for piece in sent:
                connection.sendall(piece)
            while received := connection.recv(2**16):
                said += received
        except (ConnectionResetError, BrokenPipeError):  # closed while there was more to read
            pass
        return said


def statuses(said: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", said)]


# Two requests in one

INNER = b"GET /smuggled HTTP/1.1\r\n" + AUTHORIZED + b"\r\n\r\n"


def post(*headers: bytes, body: bytes = INNER, version: bytes = b"1.1", key: bytes = AUTHORIZED) -> bytes:
    return b"\r\n".join([b"POST /solve HTTP/" + version, key, *headers, b"", body])


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body + INNER)


CHUNKED, END = b"Transfer-Encoding: chunked", b"0\r\n\r\n"
SIZE = len(INNER)
AMBIGUOUS = {
    "length and chunks": post(b"Content-Length: %d" % (SIZE + 5), CHUNKED, body=END + INNER),
    "chunks and length": post(CHUNKED, b"Content-Length: 5", body=END + INNER),
    "two lengths": post(b"Content-Length: 0", b"Content-Length: %d" % SIZE),
    "two equal lengths": post(b"Content-Length: 2", b"Content-Length: 2", body=b"{}" + INNER),
    "list of lengths": post(b"Content-Length: 0, %d" % SIZE),
    "length with a sign": post(b"Content-Length: +0"),
    "negative length": post(b"Content-Length: -1"),
    "hexadecimal length": post(b"Content-Length: 0x2", body=b"{}" + INNER),
    "length in two parts": post(b"Content-Length: 0 2", body=b"{}" + INNER),
    "no length": post(b"Content-Length: "),
    "length beyond 64 bits": post(b"Content-Length: 99999999999999999999999"),
    "chunk without a size": chunked(b"zz\r\n{}\r\n" + END),
    "chunk of negative size": chunked(b"-2\r\n{}\r\n" + END),
    "chunk of size 0x2": chunked(b"0x2\r\n{}\r\n" + END),
    "chunk beyond 64 bits": chunked(b"fffffffffffffffff\r\n{}\r\n" + END),
    "chunk longer than its size": chunked(b"1\r\n{}\r\n" + END),
    "chunks with bare line feeds": chunked(b"2\n{}\n0\n\n"),
    "line feed in a chunk's extension": chunked(b"2;a\nb\r\n{}\r\n" + END),
    "two codings": post(CHUNKED, b"Transfer-Encoding: identity", body=END + INNER),
    "chunked, then another": post(b"Transfer-Encoding: chunked, identity", body=END + INNER),
    "identity and length": post(b"Transfer-Encoding: identity", b"Content-Length: 0"),
    "unknown coding": post(b"Transfer-Encoding: xchunked", body=END + INNER),
    "chunked behind a control character": post(b"Transfer-Encoding:\x0bchunked", body=END + INNER),
    "chunks in HTTP/1.0": post(CHUNKED, version=b"1.0", body=END + INNER),
    "folded line": post(b"Content-Length: 0", b"X: a", b" Content-Length: %d" % SIZE),
    "folded line with a tab": post(b"X: a", b"\tTransfer-Encoding: chunked", b"Content-Length: 0", body=END + INNER),
    "space before the colon": post(b"Content-Length : %d" % SIZE),
    "space before the coding's colon": post(b"Content-Length: %d" % (SIZE + 5), b"Transfer-Encoding : chunked"),
    "bare line feed": post(b"Content-Length: 0\nTransfer-Encoding: chunked", body=END + INNER),
    "bare carriage return": post(b"X: a\rContent-Length: %d" % SIZE),
    "NUL": post(b"X: a\0b", b"Content-Length: 0"),
    "body of a request without a key": post(b"Content-Length: %d" % SIZE, key=b"Host: test"),
    "body that is too large": post(b"Content-Length: %d" % (2**20 + SIZE), body=b" " * 2**20 + INNER),
    "upgrade": INNER.replace(b"/smuggled", b"/x").replace(
        b"\r\n\r\n", b"\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
    ),
    "web socket": INNER.replace(b"/smuggled", b"/x").replace(
        b"\r\n\r\n", b"\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: YQ==\r\n\r\n"
    ),
}


def smuggled(server: ServerProcess) -> int:
    return sum(line["path"] == "/smuggled" for line in server.requests)


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_request_cannot_hide_another(server: ServerProcess, name: str) -> None:
    before = smuggled(server)

    said = exchange(server, AMBIGUOUS[name])

    (status,) = statuses(said)
    assert 400 <= status < 500
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert smuggled(server) == before


def test_what_is_no_body_is_a_request(server: ServerProcess) -> None:
    """So the test above would see one."""
    before = smuggled(server)

    said = exchange(server, post(b"Content-Length: 2", body=b"{}" + INNER))

    assert statuses(said) == [400, 404]
    assert smuggled(server) == before + 1


# Heads and connections without end


@pytest.mark.parametrize(
    "head",
    [
        b"GET /version HTTP/1.1\r\nHost: test\r\nX: " + b"a" * 2**18 + b"\r\n\r\n",
        b"GET /version HTTP/1.1\r\nHost: test\r\n" + b"X: a\r\n" * 2**16 + b"\r\n",
        b"GET /" + b"a" * 2**18 + b" HTTP/1.1\r\nHost: test\r\n\r\n",
        b"G" * 2**18,
    ],
    ids=["long header", "many headers", "long path", "long method"],
)
def test_a_head_without_end_is_refused_and_the_connection_closed(server: ServerProcess, head: bytes) -> None:
    started = time.monotonic()
    said = exchange(server, head)

    assert time.monotonic() - started < LIMIT_S, "it was closed for being idle"
    # The rest of the head may reach a closed connection, whose reset can overtake the answer.
    assert statuses(said) in ([431], [400], [])


def trickle(server: ServerProcess, begin: bytes, pieces: bytes) -> tuple[float, list[int]]:
    """Send a byte every 0.1 s. How long the server listens, and what it then says."""
    started = time.monotonic()
    with connect(server) as connection:
        connection.settimeout(0.1)
        connection.sendall(begin)
        said = b""
        while time.monotonic() - started < 10 * LIMIT_S:
            try:
                connection.sendall(pieces)
                if not (received := connection.recv(2**16)):
                    break
                said += received
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
        return time.monotonic() - started, statuses(said)


def test_heads_and_bodies_that_trickle_in_end_with_their_time(server: ServerProcess) -> None:
    """Each byte would start uvicorn's own clock again, if it had one for these."""
    heads = trickle(server, b"GET /version HTTP/1.1\r\nHost: test\r\n", b"X: a\r\n")
    bodies = trickle(server, post(b"Content-Length: 9999", body=b""), b" ")

    assert LIMIT_S <= heads[0] < 3 * LIMIT_S
    assert heads[1] == []
    assert LIMIT_S <= bodies[0] < 3 * LIMIT_S
    assert bodies[1] == [408]


def test_connections_that_say_nothing_hold_nobody_up_and_are_closed(server: ServerProcess) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(300)]
        assert httpx.get(f"{server.url}/health", timeout=1).status_code == 200
        assert all(connection.recv(1) == b"" for connection in silent)


# Other files


@pytest.mark.parametrize(
    "path",
    [
        "/playground/../settings.py",
        "/playground/%2e%2e/settings.py",
        "/playground/..%2fsettings.py",
        "/playground/%252e%252e%252fsettings.py",
        "/playground/..%5csettings.py",
        "/playground/%c0%ae%c0%ae/settings.py",
        "/playground/main.js/../../settings.py",
        "/playground//etc/passwd",
        "/playground/%2fetc%2fpasswd",
        "/playground/main.js%00.css",
        "/playground/main.js;/../x",
        "//etc/passwd",
        "http://test/playground/../settings.py",
        "file:///etc/passwd",
    ],
)
def test_no_path_leads_to_another_file(server: ServerProcess, path: str) -> None:
    said = exchange(server, f"GET {path} HTTP/1.1\r\n".encode() + AUTHORIZED + b"\r\nConnection: close\r\n\r\n")

    assert statuses(said)[0] in (400, 404)
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


# Headers of responses


@pytest.mark.parametrize(
    "given", ["a%0d%0aSet-Cookie: x=sesame", "sesame\u2028", "sesame;", "sesame\\r\\n", "<sesame>"]
)
def test_no_header_of_a_response_repeats_what_a_request_says(server: ServerProcess, given: str) -> None:
    """But for an id that is made of harmless characters only."""
    names = ("X-Request-Id", "Origin", "Referer", "User-Agent", "Cookie", "X-Forwarded-Host", "Accept")
    headers: list[tuple[str, bytes]] = [(name, given.encode()) for name in names]
    for path in ("/v1/models", "/%0d%0aSet-Cookie:%20x=sesame", "/?x=%0d%0asesame:1", "/playground/main.js"):
        response = httpx.get(server.url + path, headers=[*headers, ("Authorization", f"Bearer {KEY}".encode())])
        assert "sesame" not in str(response.headers.raw)
        assert "set-cookie" not in response.headers
    head = b"GET /health HTTP/1.1\r\nHost: test\r\nX-Request-Id: a\rSet-Cookie: sesame\r\n\r\n"
    assert b"sesame" not in exchange(server, head)


# Secrets


def test_no_refusal_writes_a_key_or_a_prompt_into_the_log(server: ServerProcess) -> None:
    begin = server.log.stat().st_size
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for given in (f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY} {KEY}", f"bearer\t{KEY}", f"Bearer {KEY},"):
            response = client.post("/solve", json={"question": KEY}, headers={"Authorization": given})
            assert response.status_code == 401
            assert KEY not in response.text
        client.headers["Authorization"] = f"Bearer {KEY}"
        for content in (
            f'{{"question": "{KEY}',
            f'{{"{KEY}": 1}}',
            f'["{KEY}"]',
            f'"{KEY}"',
            f'{{"question": ["{KEY}", 1]}}',
            f'{{"question": "{KEY}", "n": "{KEY}"}}',
            f'{{"question": "{KEY}", "model": "{KEY}"}}',
            f'{{"question": "{KEY}\\ud800"}}',
            f'{{"question": "{KEY * 9000}"}}',
        ):
            for path in ("/solve", f"/v1/chat/completions?api_key={KEY}"):
                response = client.post(path, content=content, headers={"Content-Type": "application/json"})
                assert response.status_code in (400, 404)  # 404: no such model
        forced = {"type": "regex", "regex": f"({KEY}"}
        messages = [{"role": "user", "content": KEY}]
        body = {"messages": messages, "response_format": forced}
        assert client.post("/v1/chat/completions", json=body).status_code == 400
        for path in ("/version", "/metrics", "/openapi.json", "/v1/models"):
            assert KEY not in client.get(path, params={"key": KEY}).text
    for raw in (
        f"GET / HTTP/1.1\r\nHost: test\r\nAuthorization : Bearer {KEY}\r\n\r\n",
        f"{KEY} / HTTP/1.1\r\nHost: test\r\n\r\n",
        f"GET /?{KEY} HTTP/9\r\n\r\n",
        f"POST /solve HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n{KEY}",
        f"GET / HTTP/1.1\r\nHost: test\r\nAuthorization: {KEY * 9000}\r\n\r\n",
    ):
        assert KEY.encode() not in exchange(server, raw.encode())

    with server.log.open() as log:
        log.seek(begin)
        written = log.read()
    assert written.count('"request"') > 25
    assert "sesame" not in written
