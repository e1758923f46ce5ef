"""A server on a fake engine: scripted replies, emitted from a thread of its own, no model and no tokenizer."""

import json
import threading
from collections.abc import Sequence
from types import SimpleNamespace

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.app import create_app
from server.settings import ServeSettings
from trm.chat import PIECE_CHARS, TooLong
from trm.checkpoint import Stored
from trm.config import TRMConfig
from trm.engine.engine import EngineConfig
from trm.engine.handle import Reservation
from trm.engine.hosted import Hosted
from trm.engine.request import Event, Request, Stats, TokenLogprobs, Usage
from trm.errors import TRMError

MODEL = "test/model"
N_SUPERVISION = 4
END_ID = 0
END_TOKEN = "<|im_end|>"


def say(*pieces, finish="stop", error=None):
    """A script: one token per piece of text, then the end token."""

    def script(request):
        about = {
            "logprobs": () if request.params.logprobs is None else (TokenLogprobs(-1.0, ()),),
            "traces": () if request.params.trace is None else ((((END_ID, -1.0),),),),
        }

        def usage(tokens):
            return Usage(len(request.prompt_ids), tokens, tokens * N_SUPERVISION)

        events = [Event((10 + i,), piece, None, usage(i + 1), **about) for i, piece in enumerate(pieces)]
        return [*events, Event((END_ID,), "", finish, usage(len(pieces) + 1), error, **about)]

    return script


def byte_tokenizer():
    """Id 0 is the end token, id b + 1 the byte b."""
    vocabulary = {END_TOKEN: END_ID} | {char: byte + 1 for byte, char in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_TOKEN)


def byte_ids(data):
    return tuple(byte + 1 for byte in data)


def score(rank, *top):
    """What the engine says of a token; `top` are ids."""
    return TokenLogprobs(-0.25 * rank, tuple((id_, -0.5 * place) for place, id_ in enumerate(top)))


def scored(request):
    """ "aé" in three tokens, the last two of which are half a character each; then the end token."""
    first, *rest = byte_ids("aé".encode())
    yield Event((first,), "a", logprobs=(score(1, first, 0),))
    yield Event(tuple(rest[:1]), "", logprobs=(score(2),))
    usage = Usage(len(request.prompt_ids), 4, 16)
    yield Event((*rest[1:], 0), "é", "stop", usage, logprobs=(score(3, 9999), score(4, 0)))


async def read_stream(client, url, body):
    """The decoded events of a stream, [DONE] checked and dropped."""
    response = await client.post(url, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


class FakeChat:
    """One id per character; remembers the conversations."""

    end_id = END_ID
    template = "{{ messages }}"
    knows_tools = True

    def __init__(self):
        self.conversations = []
        self.tools = []
        self.tokenizer = byte_tokenizer()

    def encode(self, messages, add_generation_prompt=True, at_most=None, tools=()):
        self.tools.append(list(tools))
        self.conversations.append([dict(message) for message in messages])
        turns = [f"{message['role']}:{message['content']};" for message in messages]
        return self.encode_prompt("".join([*turns, "assistant:"] if add_generation_prompt else turns), at_most)

    def encode_prompt(self, text, at_most=None):
        if at_most is not None and len(text) > max(at_most, PIECE_CHARS):
            raise TooLong(at_most, "prompt")
        return [ord(char) % 256 for char in text]

    def decode_with_specials(self, ids):
        return self.tokenizer.decode(ids)


class FakeHandle:
    def __init__(self, engine, request):
        self.request = request
        self.cancelled = False
        self.ended = False
        self._engine = engine

    def cancel(self):
        with self._engine.changed:
            self.cancelled = True
            self._engine.changed.notify_all()


class FakeEngine:
    """The interface of `trm.engine.engine.Engine`.

    script: what a request is answered with. refuse: an error that reserve raises. hold(): nothing is
    emitted until release(); a cancelled request ends at once, as with the real engine.
    """

    def __init__(self, script=None, max_rows=4, max_queue=8, max_model_len=400):
        stored = Stored(parameters=1_234_567, size_bytes=4_938_268, digest="ab" * 32)
        self.model = SimpleNamespace(config=TRMConfig(n_supervision=N_SUPERVISION), stored=stored)
        self.chat = FakeChat()
        self.config = EngineConfig(max_rows=max_rows, max_queue=max_queue)
        self.max_model_len = max_model_len
        self.decoders = {None: Hosted(self.model, self.chat, max_supervision=16)}
        self.dtype, self.exact = "float32", False
        self.script = script or say("so ", r"\boxed{72}")
        self.refuse: TRMError | None = None
        self.dead = False
        self.changed = threading.Condition()
        self.handles: list[FakeHandle] = []
        self.reserved = 0  # places
        self._held = False
        self._threads: list[threading.Thread] = []

    @property
    def requests(self) -> list[Request]:
        return [handle.request for handle in self.handles]

    def decoder(self, name):
        return self.decoders[name]

    def reserve(self, count: int):
        if self.refuse is not None:
            raise self.refuse
        self.reserved += count
        return Reservation(count, self._give_back)

    def _give_back(self, reservation):
        self.reserved -= reservation.count
        reservation.count = 0

    def submit(self, requests: Sequence[Request], on_event, reservation):
        assert len(requests) <= reservation.count
        reservation.release()
        handles = [FakeHandle(self, request) for request in requests]
        self.handles += handles
        thread = threading.Thread(target=self._emit, args=(handles, on_event))
        self._threads.append(thread)
        thread.start()
        return handles

    def _emit(self, handles, on_event):
        """The events of all requests in turn, as batched decoding gives them."""
        left = {index: iter(self.script(handle.request)) for index, handle in enumerate(handles)}
        while left:
            for index in list(left):
                event = self._next(handles, index, left)
                if event is not None:
                    handles[index].ended = event.finish_reason is not None
                    if handles[index].ended:
                        del left[index]
                    on_event(index, event)

    def _next(self, handles, index, left):
        with self.changed:
            self.changed.wait_for(lambda: not self._held or any(handles[i].cancelled for i in left))
            if handles[index].cancelled:
                return Event((), "", "cancelled", Usage(len(handles[index].request.prompt_ids), 0, 0))
            if self._held:
                return None
        return next(left[index])  # without the lock: scripts may wait

    def hold(self):
        self._held = True  # without the lock: scripts call this too

    def release(self):
        with self.changed:
            self._held = False
            self.changed.notify_all()

    def alive(self):
        return not self.dead

    def stats(self):
        return Stats(
            requests_running=1,
            requests_waiting=2,
            kv_cache_usage_ratio=0.25,
            kv_cache_bytes=1000,
            kv_cache_bytes_per_token=10,
            steps=33,
            row_places=44,
            ticks=55,
            row_steps=66,
            backbone_calls=77,
            prompt_tokens=88,
            cached_tokens=99,
            generation_tokens=111,
            draft_tokens=122,
            accepted_tokens=133,
        )

    def join(self):
        """Wait until everything submitted has ended."""
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive(), "a request never ended"


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def engine():
    engine = FakeEngine()
    yield engine
    engine.release()
    engine.join()


@pytest.fixture
def make_app(engine):
    """Builds an app on the fake engine; keyword arguments are settings."""
    return lambda **settings: create_app(engine, ServeSettings(served_model_name=MODEL, **settings))


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def connect():
    """A client of an app, without sockets."""
    return lambda app: httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.fixture
async def client(app, connect):
    async with connect(app) as client:
        yield client


@pytest.fixture
def chat_body():
    """The smallest chat request, and more fields if given."""
    return lambda content="2+2?", **fields: {"messages": [{"role": "user", "content": content}], **fields}


@pytest.fixture(name="say")
def say_fixture():
    return say
