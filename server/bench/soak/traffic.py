"""What clients of all kinds ask of a server, and whether each got what was due to it.

An `Errand` is one request with the manner of its client; `run` sees it through and says how it ended:
answered, refused as it should be, left on purpose, or failed. Nothing is drawn but from the given
`random.Random`. The texts of replies are judged only where a grammar says what they may be.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from server.bench.soak.connection import Connection, Head, message
from trm.bench.workload import make_questions

Outcome = Literal["answered", "refused", "left", "failed"]
Body = dict[str, Any]

PATIENCE_S = 300  # until an answer is whole
TOKENIZED_AT_ONCE = 64
SLOW_READS, SLOW_READ_S = 40, 0.5  # so many pieces does a slow reader take slowly
MAX_BODY_BYTES = 2**20
BODY_TIMEOUT_S = 5
REASONS = {400: "invalid", 404: "not_found", 405: "wrong_method", 408: "slow_body", 413: "too_large", 429: "overloaded"}
"""Status of a refusal -> the reason that the server counts it by."""


@dataclass(frozen=True)
class Told:
    """What an answer said: its texts and how each ended, in order."""

    texts: tuple[str, ...]
    finishes: tuple[str | None, ...]
    tokens: int | None = None  # None: a stream that was not asked for its usage


@dataclass(frozen=True)
class Leaving:
    """When a client leaves: after a share of its request's bytes, then `wait_s`, then so many pieces of the answer."""

    share: float = 1.0
    wait_s: float = 0.0
    pieces: int = 0
    cut_off: bool = False  # a reset instead of a goodbye


@dataclass(frozen=True)
class Errand:
    """One request. `due`: the status of the answer; a full queue may say 429 to whatever decodes."""

    kind: str
    path: str
    body: Any = None
    method: str = "POST"
    raw: bytes | None = None  # instead of the body
    announced: int | None = None  # a length that is not that of the body
    due: int = 200
    count: int = 1  # texts that the answer must have
    accept: Callable[[str], bool] | None = None  # of a text that came to its end
    leaving: Leaving | None = None
    slow: bool = False

    @property
    def stream(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def alone(self) -> bool:
        """Whether it needs a connection of its own."""
        return self.leaving is not None or self.slow or self.announced is not None

    def message(self, url: str) -> bytes:
        content = b"" if self.body is None else json.dumps(self.body).encode()
        return message(url, self.method, self.path, content if self.raw is None else self.raw, self.announced)


@dataclass
class Record:
    """How an errand ended. Times are seconds; `at` since the traffic began."""

    kind: str
    outcome: Outcome
    why: str  # the reason of a refusal, or what is wrong
    at: float
    seconds: float
    first_s: float | None = None  # to the first piece of a stream
    told: Told | None = None


@dataclass
class Clients:
    """Sends errands to one server, keeps the books, and knows how many connections are open."""

    url: str
    records: list[Record] = field(default_factory=list)
    connections: int = 0
    began: float = field(default_factory=time.perf_counter)

    async def work(self, draw: Callable[[], Errand], until: float, rng: random.Random) -> None:
        """One client: errand after errand until that time, on its old connection as often as on a new one."""
        connection: Connection | None = None
        while time.perf_counter() < until:
            errand = draw()
            if connection is not None and (errand.alone or rng.random() < 0.5):  # nobody keeps one that idles
                await self._close(connection)
                connection = None
            _, connection = await self.run(errand, connection)
        await self._close(connection)

    async def once(self, errand: Errand) -> Record:
        """One errand on a connection of its own."""
        record, connection = await self.run(errand)
        await self._close(connection)
        return record

    async def run(self, errand: Errand, connection: Connection | None = None) -> tuple[Record, Connection | None]:
        """See one errand through, whatever comes, on this connection or a new one; with its record comes the
        connection, where another errand may follow on it.
        """
        keep = not errand.alone
        started = time.perf_counter()
        record = Record(errand.kind, "failed", "", started - self.began, 0.0)
        try:
            async with asyncio.timeout(PATIENCE_S):
                if connection is None:
                    connection = await Connection.open(self.url, errand.slow)
                    self.connections += 1
                if errand.leaving is None:
                    await self._ask(errand, connection, record, started)
                    keep = keep and connection.reusable
                else:
                    await self._leave(errand, errand.leaving, connection, record)
        except TimeoutError:
            record.outcome, record.why = "failed", f"no whole answer within {PATIENCE_S} s"
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            record.outcome, record.why = "failed", f"{type(error).__name__}: {error}"
        record.seconds = time.perf_counter() - started
        self.records.append(record)
        if record.outcome == "failed" or not keep:
            await self._close(connection)
            connection = None
        return record, connection

    async def _ask(self, errand: Errand, connection: Connection, record: Record, started: float) -> None:
        await connection.send(errand.message(self.url))
        head = await connection.head()
        pieces: list[bytes] = []
        async for piece in connection.pieces():
            if record.first_s is None and errand.stream:
                record.first_s = time.perf_counter() - started
            pieces.append(piece)
            if errand.slow and len(pieces) <= SLOW_READS:
                await asyncio.sleep(SLOW_READ_S)
        record.outcome, record.why, record.told = judge(errand, head, b"".join(pieces))

    async def _leave(self, errand: Errand, leaving: Leaving, connection: Connection, record: Record) -> None:
        data = errand.message(self.url)
        await connection.send(data[: round(len(data) * leaving.share)])
        await asyncio.sleep(leaving.wait_s)
        record.outcome = "left"
        if leaving.pieces:
            head = await connection.head()
            if head.status != 200:
                record.outcome, record.why, _ = judge(errand, head, await connection.body())
                return
            came = 0
            async for _ in connection.pieces():
                came += 1
                if came == leaving.pieces:
                    break
        if leaving.cut_off:
            connection.abort()

    async def _close(self, connection: Connection | None) -> None:
        if connection is not None:
            self.connections -= 1
            await connection.close()


def judge(errand: Errand, head: Head, content: bytes) -> tuple[Outcome, str, Told | None]:
    """How an errand ended whose answer is whole, and why."""
    if head.status >= 400:
        error = json.loads(content)["error"]
        if head.status == 429 and (error["code"] != "queue_full" or int(head.headers["retry-after"]) < 1):
            return "failed", f"429 with code {error['code']!r}, Retry-After {head.headers.get('retry-after')!r}", None
        if head.status == errand.due or (head.status == 429 and decodes(errand)):
            return "refused", REASONS[head.status], None
    if head.status != errand.due:
        return "failed", f"status {head.status} instead of {errand.due}: {content[:300]!r}", None
    if not decodes(errand):
        return "answered", "", None
    told = read_stream(content) if errand.stream else read_body(json.loads(content))
    wrong = complaint(errand, told)
    return ("failed", wrong, None) if wrong else ("answered", "", told)


def decodes(errand: Errand) -> bool:
    """Whether it asks for tokens, and so may meet a full queue."""
    return errand.method == "POST" and errand.path in ("/v1/chat/completions", "/v1/completions", "/solve")


def complaint(errand: Errand, told: Told) -> str:
    """What is wrong with an answer; nothing: an empty string."""
    if len(told.texts) != errand.count:
        return f"{len(told.texts)} texts instead of {errand.count}"
    if strange := set(told.finishes) - {"stop", "length"}:
        return f"finish reasons {strange}"
    most = max(errand.count, errand.body.get("n", 1)) * errand.body["max_tokens"]
    if told.tokens is not None and not 0 < told.tokens <= most:
        return f"{told.tokens} tokens, at most {most} were asked for"
    for text, finish in zip(told.texts, told.finishes, strict=True):
        if finish == "stop" and errand.accept is not None and not errand.accept(text):
            return f"a text that its grammar does not allow: {text[:200]!r}"
    return ""


def read_body(body: Body) -> Told:
    """A whole answer of any of the decoding routes."""
    if "choices" in body:
        choices = body["choices"]
        texts = tuple(choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices)
        return Told(texts, tuple(choice["finish_reason"] for choice in choices), body["usage"]["completion_tokens"])
    results = body.get("results", [body])
    return Told(
        tuple(result["solution"] for result in results),
        tuple(result["finish_reason"] for result in results),
        sum(result["usage"]["completion_tokens"] for result in results),
    )


def read_stream(content: bytes) -> Told:
    """A whole stream of any of the decoding routes. Raises ValueError where it is none, or tells of an error."""
    *events, end = [event for event in content.split(b"\n\n") if event and not event.startswith(b":")]
    if end != b"data: [DONE]":
        raise ValueError(f"the stream ended in {end[:200]!r}")
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    results: dict[int, Body] = {}
    tokens = None
    for event in events:
        said = json.loads(event.removeprefix(b"data: "))
        if "error" in said:
            raise ValueError(f"the stream told of an error: {said['error']}")
        if said.get("type") == "result":
            results[said["index"]] = said["result"]
        for choice in said.get("choices", ()):
            index = choice["index"]
            if index in finishes:
                raise ValueError(f"choice {index} went on after its end")
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[index] = texts.get(index, "") + piece
            if choice["finish_reason"] is not None:
                finishes[index] = choice["finish_reason"]
        if said.get("usage"):
            tokens = said["usage"]["completion_tokens"]
    if results:
        return read_body({"results": [results[index] for index in sorted(results)]})
    return Told(tuple(texts[index] for index in sorted(texts)), tuple(map(finishes.get, sorted(texts))), tokens)


# What is asked

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Tom", "Anna"]}, "apples": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "apples"],
    "additionalProperties": False,
}
FORMATS: Sequence[tuple[Body, Callable[[str], bool]]] = (
    ({"type": "json_object"}, lambda text: isinstance(json.loads(text), dict)),
    (
        {"type": "json_schema", "json_schema": {"name": "apples", "schema": SCHEMA}},
        lambda text: set(json.loads(text)) == {"name", "apples"},
    ),
    ({"type": "regex", "regex": "[0-9]{1,3} (km|m)"}, lambda text: bool(re.fullmatch("[0-9]{1,3} (km|m)", text))),
    ({"type": "choice", "choice": ["yes", "no", "who knows"]}, lambda text: text in ("yes", "no", "who knows")),
)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
CHAT, COMPLETIONS, SOLVE = "/v1/chat/completions", "/v1/completions", "/solve"


class Draw:
    """Draws errands for a server that takes `max_model_len` tokens and `max_steps` supervision steps."""

    def __init__(self, rng: random.Random, max_model_len: int, max_steps: int) -> None:
        self.rng, self.max_model_len, self.max_steps = rng, max_model_len, max_steps
        self.questions = [question for question, _ in make_questions(500, [1], rng.randrange(2**31))]
        self.kinds: Mapping[str, tuple[int, Callable[[], Errand]]] = {
            "chat": (16, self.chat),
            "chat, streamed": (14, lambda: self.chat("chat, streamed", stream=True)),
            "long prompt": (6, self.long_prompt),
            "several samples": (6, self.samples),
            "completion": (8, self.completion),
            "solve": (8, self.solve),
            "solve by votes": (6, self.votes),
            "grammar": (8, self.grammar),
            "bad request": (8, self.bad),
            "leaves before the answer": (8, self.leaves_before),
            "leaves in mid-stream": (6, self.leaves_streaming),
            "slow reader": (1, self.slow_reader),
            "no decoding": (5, self.no_decoding),
        }
        self._weights = [weight for weight, _ in self.kinds.values()]
        self._makers = [maker for _, maker in self.kinds.values()]

    def __call__(self) -> Errand:
        return self.rng.choices(self._makers, self._weights)[0]()

    def question(self) -> str:
        return self.rng.choice(self.questions)

    def decoding(self, max_tokens: int = 80) -> Body:
        """Length, depth and sampling, now and then left to the server's defaults."""
        rng = self.rng
        body: Body = {"max_tokens": rng.randint(1, max_tokens)}
        match rng.randrange(4):
            case 0 | 1:
                body["reasoning_effort"] = rng.choice(EFFORTS)
            case 2:
                body["supervision_steps"] = rng.randint(0, self.max_steps)
        if rng.random() < 0.2:
            body["halt_tolerance"] = 0.01
        if rng.random() < 0.4:
            body["temperature"] = rng.choice((0.3, 0.7, 1.2))
            if rng.random() < 0.7:
                body["seed"] = rng.randrange(2**31)
        return body

    def generation(self, max_tokens: int = 80) -> Body:
        """What OpenAI's routes take besides."""
        rng = self.rng
        body = self.decoding(max_tokens)
        extras: Sequence[Body] = (
            {"top_p": 0.9},
            {"top_k": 20, "min_p": 0.05},
            {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2},
            {"logit_bias": {str(rng.randrange(10, 400)): 5.0}},
            {"stop": ["apples", "\n\n"]},
            {"ignore_eos": True},
            {"user": "soak", "metadata": {"run": "soak"}},
            {"model": None},
        )
        for extra in rng.sample(extras, rng.choice((0, 0, 1, 2))):
            body |= extra
        return body

    def streaming(self) -> Body:
        options: Sequence[Body] = (
            {},
            {"stream_options": {"include_usage": True}},
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        )
        return {"stream": True} | self.rng.choice(options)

    def chat(self, kind: str = "chat", stream: bool = False, **more: Any) -> Errand:
        rng = self.rng
        body: Body = {"messages": [{"role": "user", "content": self.question()}]} | self.generation()
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": rng.randint(0, 5)}
        if rng.random() < 0.1:
            body |= {"trace": rng.randint(1, 5)}
        return Errand(kind, CHAT, body | (self.streaming() if stream else {}) | more, count=more.get("n", 1))

    def long_prompt(self) -> Errand:
        """A conversation that takes up to most of the context; every other one begins like many before it."""
        rng = self.rng
        stories = self.questions if rng.random() < 0.5 else rng.sample(self.questions, len(self.questions))
        words = rng.randint(self.max_model_len // 5, self.max_model_len * 2 // 5)
        turns: list[Body] = [{"role": "system", "content": "Answer briefly."}]
        for story in stories:
            if words <= 0:
                break
            words -= len(story.split())
            turns += [{"role": "user", "content": story}, {"role": "assistant", "content": "I do not know."}]
        turns.append({"role": "user", "content": self.question()})
        return self.chat("long prompt", rng.random() < 0.5, messages=turns, max_tokens=rng.randint(1, 40))

    def samples(self) -> Errand:
        n = self.rng.randint(2, 4)
        return self.chat("several samples", self.rng.random() < 0.5, n=n, temperature=0.8, max_tokens=40)

    def completion(self) -> Errand:
        rng = self.rng
        prompts: list[Any] = [self.question() for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.3:
            prompts = [[rng.randrange(10, 400) for _ in range(rng.randint(1, 60))] for _ in prompts]
        body = {"prompt": prompts if len(prompts) > 1 else prompts[0]} | self.generation(40)
        if rng.random() < 0.2:
            body["logprobs"] = rng.randint(0, 5)
        body |= self.streaming() if rng.random() < 0.5 else {}
        return Errand("completion", COMPLETIONS, body, count=len(prompts))

    def solve(self) -> Errand:
        questions = [self.question() for _ in range(self.rng.choice((1, 1, 2)))]
        body: Body = {"question": questions if len(questions) > 1 else questions[0]} | self.decoding()
        body["stream"] = self.rng.random() < 0.3
        return Errand("solve", SOLVE, body, count=len(questions))

    def votes(self) -> Errand:
        body = {"question": self.question(), "n": self.rng.randint(2, 6), "max_tokens": 60}
        body |= {"stream": self.rng.random() < 0.5, "early_stop": self.rng.random() < 0.5}
        body["seed"] = self.rng.randrange(2**31)
        return Errand("solve by votes", SOLVE, body)

    def grammar(self) -> Errand:
        """A grammar that others ask for, or one that nobody has asked for before."""
        rng = self.rng
        wanted, accept = rng.choice(FORMATS)
        if rng.random() < 0.3:
            options = [f"{rng.randrange(10**6)} apples" for _ in range(3)]
            wanted, accept = {"type": "choice", "choice": options}, lambda text: text in options
        body: Body = {"messages": [{"role": "user", "content": self.question()}], "response_format": wanted}
        body |= self.decoding() | (self.streaming() if rng.random() < 0.5 else {})
        return Errand("grammar", CHAT, body, accept=accept)

    def bad(self) -> Errand:
        """Something that must be refused, each time for one reason."""
        chat: Body = {"messages": [{"role": "user", "content": self.question()}], "max_tokens": 5}
        wrong: Sequence[Body] = (
            {"colour": "red"},
            {"temperature": -1},
            {"max_tokens": "5"},
            {"n": 65},
            {"supervision_steps": self.max_steps + 1},
            {"reasoning_effort": "low", "supervision_steps": 1},
            {"messages": []},
            {"messages": [{"role": "user", "content": "How many? " * self.max_model_len}]},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            {"response_format": {"type": "regex", "regex": "(?=a)b"}},
        )
        errands: Sequence[tuple[int, Body]] = (
            *((400, {"path": CHAT, "body": chat | fields}) for fields in wrong),
            (400, {"path": CHAT, "raw": b'{"messages": [{"role"'}),
            (400, {"path": SOLVE, "raw": b"\xff\xfe\x00"}),
            (400, {"path": SOLVE, "body": {"question": " "}}),
            (404, {"path": CHAT, "body": chat | {"model": "no-such-model"}}),
            (404, {"path": "/v1/embeddings", "body": {"input": "a"}}),
            (405, {"path": "/health"}),
            (408, {"path": CHAT, "raw": b'{"messages": ', "announced": 1000}),
            (413, {"path": CHAT, "raw": b"{" + b" " * 2**15, "announced": 2 * MAX_BODY_BYTES}),
        )
        due, fields = self.rng.choice(errands)
        return Errand("bad request", due=due, **fields)

    def leaves_before(self) -> Errand:
        rng = self.rng
        body = {"max_tokens": 200, "ignore_eos": True, "n": rng.choice((1, 3)), "temperature": 1.0}
        chat: Body = {"messages": [{"role": "user", "content": self.question()}]} | body
        leaving = Leaving(rng.choice((0.0, 0.3, 0.9, 1.0, 1.0)), rng.choice((0.0, 0.02, 0.3)), 0, rng.random() < 0.5)
        return Errand("leaves before the answer", CHAT, chat, leaving=leaving)

    def leaves_streaming(self) -> Errand:
        rng = self.rng
        errand = self.chat("", True, max_tokens=200, ignore_eos=True)
        leaving = Leaving(pieces=rng.randint(1, 20), cut_off=rng.random() < 0.5)
        return Errand("leaves in mid-stream", CHAT, errand.body, leaving=leaving)

    def slow_reader(self) -> Errand:
        """More to tell than sockets hold, megabytes, to someone who takes it slowly: the server has to wait."""
        body: Body = {"messages": [{"role": "user", "content": self.question()}], "max_tokens": 50, "ignore_eos": True}
        body |= {"supervision_steps": self.max_steps, "n": 8, "temperature": 1.0, "trace": 10, "stream": True}
        return Errand("slow reader", CHAT, body, count=8, slow=True)

    def no_decoding(self) -> Errand:
        rng = self.rng
        if rng.random() < 0.5:
            path = rng.choice(("/health", "/ready", "/version", "/v1/models", "/openapi.json", "/"))
            return Errand("no decoding", path, method="GET")
        if rng.random() < 0.5:
            return Errand("no decoding", "/tokenize", {"prompt": self.question(), "return_token_strs": True})
        return Errand("no decoding", "/detokenize", {"tokens": [rng.randrange(10, 400) for _ in range(50)]})

    def burst(self, count: int) -> list[Errand]:
        """Short chats, all at once: more than the server has places for."""
        return [self.chat("burst", self.rng.random() < 0.5, max_tokens=8) for _ in range(count)]

    def filling(self, count: int) -> list[Errand]:
        """As long as they can be and nothing in common: together they touch every position of as many slots. And
        enough to tokenise at once, and a file, for the server to start the threads that it keeps.
        """
        prompts = [[self.rng.randrange(10, 400) for _ in range(self.max_model_len - 1)] for _ in range(count)]
        body = {"max_tokens": 1, "supervision_steps": self.max_steps}
        texts = [Errand("warm-up", "/tokenize", {"prompt": self.question() * 30}) for _ in range(TOKENIZED_AT_ONCE)]
        texts.append(Errand("warm-up", "/", method="GET"))
        return texts + [Errand("warm-up", COMPLETIONS, {"prompt": prompt} | body) for prompt in prompts]
