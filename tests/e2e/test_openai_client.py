"""Every parameter of OpenAI's decoding routes, through OpenAI's own client, against a real server of the bundled model.

`QUESTION` the model knows how to answer, so its reply is sure of itself; at `BABBLE` it does not, so that whatever
acts on the choice of tokens changes the reply. That is left to the backbone, unless a test is about steps: it babbles
longer. `TWO_STEPS` takes two operations, of which a supervision step does one if the answer is to come at once.
"""

import asyncio
import inspect
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types import CompletionUsage

from tests.e2e.conftest import ServerProcess
from trm import bundled_model_path
from trm.chat import SYSTEM_PROMPT
from trm.config import EFFORT_NAMES

pytestmark = pytest.mark.slow

MODEL = "qwen-trm"
QUESTION = "Tom has 12 apples. He buys 7 more. How many apples does he have now?"
REPLY = "12+7=19\n\\boxed{19}"
BABBLE = "Tom"
TWO_STEPS = "Tom has 12 apples. He buys 7 more and gives 5 to Anna. How many apples does he have left?"
STEPS_FIELDS = {"supervision_steps", "reasoning_effort", "halt_threshold", "halt_tolerance"}
N_SUPERVISION = json.loads((bundled_model_path() / "config.json").read_text())["n_supervision"]


class Route:
    """One route; what its method of the client does not know goes into `extra_body`, as users send it."""

    def __init__(self, client: Any) -> None:
        self.client = client

    @property
    def create(self) -> Callable[..., Any]:
        raise NotImplementedError

    @staticmethod
    def prompt(text: str) -> dict[str, Any]:
        raise NotImplementedError

    def text(self, choice: Any) -> str:
        """Of a choice, whole or streamed."""
        raise NotImplementedError

    def ask(self, text: str = BABBLE, **fields: Any) -> Any:
        by_backbone = {"supervision_steps": 0} if text == BABBLE and not STEPS_FIELDS & fields.keys() else {}
        fields = {"max_tokens": 16, **by_backbone, **fields}
        known = inspect.signature(self.create).parameters
        native = {name: value for name, value in fields.items() if name in known}
        extra = {name: value for name, value in fields.items() if name not in known}
        return self.create(model=MODEL, **self.prompt(text), **native, extra_body=extra)

    def texts(self, text: str = BABBLE, **fields: Any) -> list[str]:
        return [self.text(choice) for choice in self.ask(text, **fields).choices]


class Chat(Route):
    @property
    def create(self) -> Callable[..., Any]:
        return self.client.chat.completions.create  # type: ignore[no-any-return]

    @staticmethod
    def prompt(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}]}

    def text(self, choice: Any) -> str:
        return str((choice.delta if hasattr(choice, "delta") else choice.message).content or "")


class Completions(Route):
    @property
    def create(self) -> Callable[..., Any]:
        return self.client.completions.create  # type: ignore[no-any-return]

    @staticmethod
    def prompt(text: str) -> dict[str, Any]:
        return {"prompt": text}

    def text(self, choice: Any) -> str:
        return str(choice.text)


def connect(server: ServerProcess, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def chat(client: openai.OpenAI) -> Chat:
    return Chat(client)


@pytest.fixture
def completions(client: openai.OpenAI) -> Completions:
    return Completions(client)


@pytest.fixture(params=["chat", "completions"])
def route(request: pytest.FixtureRequest) -> Route:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def tokenize(server: ServerProcess, **body: Any) -> list[int]:
    response = httpx.post(f"{server.url}/tokenize", json=body)
    assert response.status_code == 200, response.text
    return list(response.json()["tokens"])


def steps_mean(reply: Any) -> float:
    return float(reply.usage.trm["supervision_steps_mean"])


# What goes in


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data

    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_conversation_is_answered(chat: Chat) -> None:
    reply = chat.ask(QUESTION, max_tokens=512)

    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", REPLY, "stop")
    assert choice.boxed_answer == "19"
    assert (reply.object, reply.model) == ("chat.completion", MODEL)


def test_content_is_a_string_or_text_parts(chat: Chat) -> None:
    lines = [{"type": "text", "text": "Tom has 12 apples."}, {"type": "text", "text": "He buys 7 more."}]

    parts = chat.create(model=MODEL, messages=[{"role": "user", "content": lines}], max_tokens=16)
    string = chat.ask("Tom has 12 apples.\nHe buys 7 more.")

    assert parts.choices == string.choices
    assert parts.usage.prompt_tokens == string.usage.prompt_tokens


def test_roles_are_turns_of_the_prompt(server: ServerProcess, chat: Chat) -> None:
    def prompt_tokens(*turns: tuple[str, str]) -> int:
        messages = [{"role": role, "content": content} for role, content in turns]
        reply = chat.create(model=MODEL, messages=messages, max_tokens=1)
        assert reply.usage.prompt_tokens == len(tokenize(server, messages=messages))
        return int(reply.usage.prompt_tokens)

    alone = prompt_tokens(("user", "Hi"))
    assert prompt_tokens(("system", SYSTEM_PROMPT), ("user", "Hi")) == alone
    assert prompt_tokens(("system", "Be brief"), ("user", "Hi")) < alone
    assert prompt_tokens(("developer", "Be brief"), ("user", "Hi")) == prompt_tokens(
        ("system", "Be brief"), ("user", "Hi")
    )
    assert prompt_tokens(("user", "Hi"), ("assistant", "Hi"), ("user", "Hi")) > alone


def test_a_reply_can_be_sent_back_as_the_client_holds_it(chat: Chat) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    reply = chat.create(model=MODEL, messages=messages)

    messages += [reply.choices[0].message, {"role": "user", "content": QUESTION}]

    assert chat.create(model=MODEL, messages=messages).usage.prompt_tokens > reply.usage.prompt_tokens


def test_a_prompt_is_text_or_ids_or_a_list_of_either(server: ServerProcess, completions: Completions) -> None:
    def texts(prompt: Any) -> list[str]:
        reply = completions.create(model=MODEL, prompt=prompt, max_tokens=16)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.text for choice in reply.choices]

    ids = [tokenize(server, prompt=text) for text in ("Tom", "12+7=")]
    alone = [*texts("Tom"), *texts("12+7=")]

    assert alone[0] != alone[1]
    assert texts(ids[0]) == alone[:1]
    assert texts(["Tom", "12+7="]) == texts(ids) == alone


def test_prompts_and_samples_are_told_prompt_by_prompt(completions: Completions) -> None:
    fields = {"max_tokens": 8, "temperature": 1, "seed": 5, "n": 2, "extra_body": {"supervision_steps": 0}}
    both = completions.create(model=MODEL, prompt=["Tom", "Once"], **fields)
    alone = [completions.create(model=MODEL, prompt=prompt, **fields) for prompt in ("Tom", "Once")]

    texts = [choice.text for reply in alone for choice in reply.choices]
    assert [choice.text for choice in both.choices] == texts
    assert len(set(texts)) == 4
    assert both.usage.prompt_tokens == sum(reply.usage.prompt_tokens for reply in alone)
    assert both.usage.completion_tokens == sum(reply.usage.completion_tokens for reply in alone)


def test_user_and_metadata_change_nothing(route: Route) -> None:
    assert route.texts(user="me", metadata={"run": "1"}) == route.texts()


# How long


def test_max_tokens_cuts(route: Route) -> None:
    whole, cut = route.ask(), route.ask(max_tokens=3)

    assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (3, "length")
    assert route.text(whole.choices[0]).startswith(route.text(cut.choices[0]))
    assert len(route.text(whole.choices[0])) > len(route.text(cut.choices[0])) > 0


def test_max_completion_tokens_is_chats_other_name_for_it(chat: Chat) -> None:
    cut = chat.create(model=MODEL, **chat.prompt(BABBLE), max_completion_tokens=3)

    assert cut.usage.completion_tokens == 3
    with pytest.raises(openai.BadRequestError) as refused:
        chat.ask(max_tokens=3, max_completion_tokens=3)
    assert refused.value.param == "max_tokens"


def test_the_end_token_ends_a_reply_unless_it_is_ignored(chat: Chat) -> None:
    ended, ignored = chat.ask(QUESTION, max_tokens=40), chat.ask(QUESTION, max_tokens=40, ignore_eos=True)

    assert (ended.choices[0].finish_reason, ignored.choices[0].finish_reason) == ("stop", "length")
    assert ended.usage.completion_tokens < ignored.usage.completion_tokens == 40
    assert chat.text(ignored.choices[0]).startswith(chat.text(ended.choices[0]))


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("=", "12+7"),
        (["zz", "9\n", "{"], "12+7=1"),
        ("\\boxed{1", "12+7=19\n"),
        (["zz"], REPLY),
        ([], REPLY),
        (None, REPLY),
    ],
    ids=str,
)
def test_stop_strings_end_a_reply_and_are_no_part_of_it(chat: Chat, stop: Any, expected: str) -> None:
    reply = chat.ask(QUESTION, max_tokens=40, stop=stop)
    chunks = list(chat.ask(QUESTION, max_tokens=40, stop=stop, stream=True))

    assert (chat.text(reply.choices[0]), reply.choices[0].finish_reason) == (expected, "stop")
    assert "".join(chat.text(chunk.choices[0]) for chunk in chunks) == expected


def test_stop_strings_end_a_completion_too(completions: Completions) -> None:
    (whole,) = completions.texts()
    (cut,) = completions.texts(stop=whole[7:10])

    assert cut == whole[: whole.index(whole[7:10])]


# Which token


def test_a_seed_reproduces_and_another_one_does_not(route: Route) -> None:
    first = route.texts(temperature=1, seed=1)

    assert route.texts(temperature=1, seed=1) == first
    assert route.texts(temperature=1, seed=2) != first


def test_without_a_seed_samples_differ_unless_the_temperature_is_0(route: Route) -> None:
    assert len({route.texts(temperature=1)[0] for _ in range(4)}) > 1
    assert len({route.texts(temperature=0)[0] for _ in range(4)}) == 1
    assert route.texts() == route.texts(temperature=0, seed=9)


def test_temperature_flattens(route: Route) -> None:
    """Of the same noise a low temperature makes nearly the greedy reply, a high one something else."""
    greedy = route.texts()

    assert route.texts(temperature=0.001, seed=1) == greedy
    assert route.texts(temperature=2, seed=1) != greedy


@pytest.mark.parametrize("only", [{"top_k": 1}, {"min_p": 1}, {"top_p": 1e-6}], ids=str)
def test_what_leaves_only_the_best_token_is_greedy(route: Route, only: dict[str, Any]) -> None:
    hot = {"temperature": 2, "seed": 1}

    assert route.texts(**hot, **only) == route.texts()
    assert route.texts(**hot) != route.texts()


@pytest.mark.parametrize("limit", [{"top_k": 3}, {"min_p": 0.2}, {"top_p": 0.5}], ids=str)
def test_sampled_tokens_are_among_those_left(chat: Chat, limit: dict[str, Any]) -> None:
    """By the model's own probabilities: at temperature 1 they are what the limits count in."""
    outside = 0
    for fields in (limit, {}):
        reply = chat.ask(temperature=1, seed=3, logprobs=True, top_logprobs=20, ignore_eos=True, **fields)
        for token in reply.choices[0].logprobs.content:
            ranked = [rival.logprob for rival in token.top_logprobs]
            better = [logprob for logprob in ranked if logprob > token.logprob]
            left = {
                "top_k": len(better) < limit.get("top_k", 0),
                "min_p": token.logprob >= ranked[0] + math.log(limit.get("min_p", 1)) - 1e-4,
                "top_p": sum(map(math.exp, better)) < limit.get("top_p", 0) + 1e-4,
            }
            (name,) = limit
            assert fields == {} or left[name]
            outside += not left[name]
    assert outside > 0  # without the limit


def test_the_first_of_n_is_the_reply_alone(route: Route) -> None:
    alone = route.texts(temperature=1, seed=4)
    reply = route.ask(temperature=1, seed=4, n=3)

    texts = [route.text(choice) for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert texts[:1] == alone
    assert len(set(texts)) == 3
    assert reply.usage.completion_tokens == 3 * 16


def test_a_bias_forces_and_forbids(server: ServerProcess, route: Route) -> None:
    (forced,) = tokenize(server, prompt="7")
    (greedy,) = route.texts(max_tokens=1)
    (first,) = tokenize(server, prompt=greedy)

    assert route.texts(logit_bias={str(forced): 100}, max_tokens=4) == ["7777"]
    assert route.texts(logit_bias={str(first): -100}, max_tokens=1) != [greedy]


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0), (0, 0.75), (-1, 0.5)])
def test_penalties_come_off_the_tokens_of_the_reply(chat: Chat, presence: float, frequency: float) -> None:
    """Each greedy token is the best of the model's own likeliest ones after the penalty, and not always before it."""
    fields: dict[str, Any] = {"presence_penalty": presence, "frequency_penalty": frequency}
    reply = chat.ask(logprobs=True, top_logprobs=20, ignore_eos=True, max_tokens=24, **fields)

    def price(times: int) -> float:
        return presence * (times > 0) + frequency * times

    seen: Counter[str] = Counter()
    changed = 0
    for token in reply.choices[0].logprobs.content:
        scores = {rival.token: rival.logprob - price(seen[rival.token]) for rival in token.top_logprobs}
        assert scores[token.token] >= max(scores.values()) - 1e-3
        changed += token.token != token.top_logprobs[0].token
        seen[token.token] += 1
    assert changed > 0


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_make_replies_more_varied(completions: Completions, name: str) -> None:
    def variety(**fields: float) -> int:
        reply = completions.ask(logprobs=0, ignore_eos=True, max_tokens=32, **fields)
        return len(set(reply.choices[0].logprobs.tokens))

    neutral = 1 if name == "repetition_penalty" else 0
    assert variety(**{name: 2}) > variety(**{name: neutral}) == variety()
    assert variety(**{name: 0.01 if name == "repetition_penalty" else -2}) < variety(**{name: 2})


# How deep


@pytest.mark.parametrize("effort", EFFORT_NAMES)
def test_an_effort_is_that_many_steps_for_each_token(route: Route, effort: str) -> None:
    quarters = {"none": 0, "low": 1, "medium": 2, "high": 4, "xhigh": 6, "max": 8}
    steps = 1 if effort == "minimal" else math.ceil(quarters[effort] * N_SUPERVISION / 4)

    assert steps_mean(route.ask(reasoning_effort=effort)) == steps


def test_steps_are_exact_and_high_is_the_default(route: Route) -> None:
    assert steps_mean(route.ask(supervision_steps=5)) == 5
    assert steps_mean(route.ask(QUESTION)) == N_SUPERVISION
    for steps, effort in ((400, None), (-1, None), (2, "low")):
        with pytest.raises(openai.BadRequestError) as refused:
            route.ask(supervision_steps=steps, **({} if effort is None else {"reasoning_effort": effort}))
        assert refused.value.param == "supervision_steps"


@pytest.mark.parametrize("fields", [{"halt_threshold": 0.5}, {"halt_tolerance": 0.05}], ids=str)
def test_halting_spends_fewer_steps(server: ServerProcess, route: Route, fields: dict[str, float]) -> None:
    prompt = (
        {"prompt": tokenize(server, **Chat.prompt(BABBLE))} if isinstance(route, Completions) else Chat.prompt(BABBLE)
    )

    def steps(**fields: float) -> float:
        return steps_mean(
            route.create(model=MODEL, **prompt, max_tokens=16, extra_body={"supervision_steps": 16, **fields})
        )

    assert 1 <= steps(**fields) < steps() == 16


def test_answered_at_once_each_step_does_one_operation(server: ServerProcess, chat: Chat) -> None:
    prompt = tokenize(server, **chat.prompt(TWO_STEPS), work="none")

    for steps, says in ((1, r"\boxed{19}"), (2, r"\boxed{14}"), (N_SUPERVISION, r"\boxed{14}")):
        assert chat.texts(TWO_STEPS, work="none", supervision_steps=steps) == [says]
        completed = chat.client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=16, extra_body={"supervision_steps": steps}
        )
        assert completed.choices[0].text == says


def test_the_stricter_the_halting_the_more_steps(chat: Chat) -> None:
    def steps(**fields: float) -> float:
        return steps_mean(chat.ask(TWO_STEPS, work="none", supervision_steps=16, **fields))

    assert steps(halt_threshold=0.5) > steps(halt_threshold=0.01)
    assert steps(halt_tolerance=0.0001) > steps(halt_tolerance=0.5)


# What comes out


def test_logprobs_of_chat(chat: Chat) -> None:
    reply = chat.ask(QUESTION, max_tokens=40, logprobs=True, top_logprobs=3)

    content = reply.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode() == REPLY
    assert "".join(token.token for token in content) == REPLY
    assert len(content) == reply.usage.completion_tokens - 1  # the end token is no content
    for token in content:
        ranked = [rival.logprob for rival in token.top_logprobs]
        assert len(ranked) == 3
        assert ranked == sorted(ranked, reverse=True)
        assert sum(map(math.exp, ranked)) <= 1 + 1e-5
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, ranked[0])  # at temperature 0
    assert chat.ask(QUESTION, max_tokens=40, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat.ask(QUESTION).choices[0].logprobs is None


def test_logprobs_of_completions(completions: Completions) -> None:
    reply = completions.ask(logprobs=3, stop="zz")

    (choice,) = reply.choices
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == [len("".join(told.tokens[:place])) for place in range(len(told.tokens))]
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 16
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values())
    chosen = completions.ask(logprobs=0).choices[0].logprobs
    assert chosen.top_logprobs == [
        {token: logprob} for token, logprob in zip(told.tokens, chosen.token_logprobs, strict=True)
    ]
    assert completions.ask().choices[0].logprobs is None


def test_logprobs_of_both_routes_are_the_same(server: ServerProcess, chat: Chat, completions: Completions) -> None:
    prompt = tokenize(server, **chat.prompt(BABBLE))
    fields = {"temperature": 1, "seed": 6, "max_tokens": 8}

    told = completions.create(model=MODEL, prompt=prompt, logprobs=0, **fields).choices[0]
    said = chat.create(model=MODEL, **chat.prompt(BABBLE), logprobs=True, **fields).choices[0]

    assert told.text == said.message.content
    assert told.logprobs.token_logprobs == pytest.approx([token.logprob for token in said.logprobs.content], abs=1e-3)


def test_usage_adds_up(server: ServerProcess, chat: Chat) -> None:
    question = "Ann has 31 eggs and sells 17 of them. How many eggs are left?"  # asked nowhere else
    first, second = (chat.ask(question, max_tokens=40, temperature=1, n=2).usage for _ in range(2))

    prompt = tokenize(server, **chat.prompt(question))
    for usage in (first, second):
        assert isinstance(usage, CompletionUsage)
        assert usage.prompt_tokens == len(prompt)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.completion_tokens_details.reasoning_tokens == 0
        assert 0 <= usage.trm["accepted_tokens"] <= usage.trm["draft_tokens"]
    assert first.prompt_tokens_details.cached_tokens < second.prompt_tokens_details.cached_tokens == len(prompt) - 1


def test_box_and_text_of_a_completion(server: ServerProcess, chat: Chat, completions: Completions) -> None:
    prompt = tokenize(server, **chat.prompt(QUESTION))

    reply = completions.create(model=MODEL, prompt=prompt)

    assert (reply.object, reply.choices[0].text, reply.choices[0].boxed_answer) == ("text_completion", REPLY, "19")
    assert reply.choices[0].finish_reason == "stop"


# Streams


@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1, "seed": 8}], ids=str)
def test_a_stream_is_the_whole_in_pieces(route: Route, fields: dict[str, Any]) -> None:
    whole = route.ask(QUESTION, max_tokens=40, **fields)
    options = {"include_usage": True}
    *chunks, last = route.ask(QUESTION, max_tokens=40, **fields, stream=True, stream_options=options)

    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(map(route.text, own)) == route.text(choice)
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert own[-1].boxed_answer == choice.boxed_answer
        if isinstance(route, Chat):
            assert [part.delta.role for part in own] == ["assistant"] + [None] * (len(own) - 1)
            assert own[-1].delta.to_dict() == {}
    assert {chunk.usage for chunk in chunks} == {None}
    assert last.choices == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(last.usage, name) == getattr(whole.usage, name)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in (*chunks, last)}) == 1


def test_usage_is_streamed_only_on_request_and_continuously_on_another(route: Route) -> None:
    plain = list(route.ask(stream=True))
    options = {"include_usage": True, "continuous_usage_stats": True}
    counted = list(route.ask(stream=True, stream_options=options))

    assert {chunk.usage for chunk in plain} == {None}
    assert all(chunk.choices for chunk in plain)
    counts = [chunk.usage.completion_tokens for chunk in counted]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 16
    assert {chunk.usage.prompt_tokens for chunk in counted} == {counted[-1].usage.prompt_tokens}


def test_logprobs_are_streamed(chat: Chat, completions: Completions) -> None:
    content = chat.ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    chunks = [chunk.choices[0] for chunk in chat.ask(logprobs=True, top_logprobs=2, stream=True)]
    assert [token.token for part in chunks if part.logprobs for token in part.logprobs.content] == [
        token.token for token in content
    ]

    told = completions.ask(logprobs=2).choices[0].logprobs
    chunks = [chunk.choices[0] for chunk in completions.ask(logprobs=2, stream=True)]
    for name in ("tokens", "text_offset"):
        pieces = [item for part in chunks if part.logprobs for item in getattr(part.logprobs, name)]
        assert pieces == getattr(told, name)


def test_the_last_line_is_done(server: ServerProcess, route: Route) -> None:
    path = "/chat/completions" if isinstance(route, Chat) else "/completions"
    body = {**route.prompt(BABBLE), "max_tokens": 2, "stream": True}

    lines = [line for line in httpx.post(f"{server.url}/v1{path}", json=body).text.splitlines() if line]

    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])


def test_the_asynchronous_client_gets_the_same_from_both_routes_at_once(
    server: ServerProcess, chat: Chat, completions: Completions
) -> None:
    async def together() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def both(route: Route, text: str) -> tuple[str, str]:
                whole, stream = await asyncio.gather(route.ask(text), route.ask(text, stream=True))
                pieces = [route.text(chunk.choices[0]) async for chunk in stream]
                return route.text(whole.choices[0]), "".join(pieces)

            texts = (QUESTION, BABBLE, "12+7=")
            return await asyncio.gather(*(both(kind(client), text) for kind in (Chat, Completions) for text in texts))

    alone = [route.texts(text)[0] for route in (chat, completions) for text in (QUESTION, BABBLE, "12+7=")]
    assert asyncio.run(together()) == [(text, text) for text in alone]


# Headers


def test_a_response_carries_its_id_and_timings(client: openai.OpenAI, route: Route) -> None:
    resource = client.chat.completions if isinstance(route, Chat) else client.completions
    response = resource.with_raw_response.create(  # type: ignore[call-overload]
        model=MODEL, **route.prompt(QUESTION), extra_headers={"X-Request-Id": "mine-1"}
    )

    assert response.headers["x-request-id"] == "mine-1"
    assert response.parse().id.endswith("-mine-1")
    assert response.parse()._request_id == "mine-1"
    assert 0 <= int(response.headers["openai-processing-ms"]) < 60_000
    assert "first_token;dur=" in response.headers["server-timing"]


# Errors, by class


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"repetition_penalty": 11}, "repetition_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"halt_threshold": 1}, "halt_threshold"),
        ({"halt_tolerance": 0}, "halt_tolerance"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"user": 5}, "user"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"functions": [{"name": "a"}]}, "functions"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
    ids=str,
)
def test_bad_values_are_bad_requests_that_name_the_field(route: Route, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        route.ask(**fields)

    error = refused.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", param)
    assert error.request_id


@pytest.mark.parametrize("fields", [{"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}], ids=str)
def test_top_logprobs_need_logprobs_and_have_a_limit(chat: Chat, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat.ask(**fields)
    assert refused.value.param == "top_logprobs"


@pytest.mark.parametrize("fields", [{"echo": True}, {"suffix": "."}, {"best_of": 2}, {"logprobs": 21}], ids=str)
def test_completions_refuse_by_name_what_they_do_not_do(completions: Completions, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        completions.ask(**fields)
    (name,) = fields
    assert refused.value.param == name


def test_completions_take_what_asks_for_nothing(completions: Completions) -> None:
    assert completions.texts(echo=False, suffix=None, best_of=1) == completions.texts()


@pytest.mark.parametrize("prompt", ["", [], [[]], [2048], [-1], ["a", 1]], ids=str)
def test_what_is_no_prompt(completions: Completions, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        completions.create(model=MODEL, prompt=prompt)
    assert refused.value.param == "prompt"


def test_a_prompt_that_is_too_long_has_its_own_code(route: Route) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        route.ask("How many apples? " * 2000)

    assert refused.value.code == "context_length_exceeded"
    assert "4096" in refused.value.message


def test_another_model_is_not_found(route: Route) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        route.create(model="gpt-4", **route.prompt(BABBLE))

    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_no_error_is_a_422(server: ServerProcess) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/solve"):
        for body in ({}, {"prompt": {}}, {"messages": [{}]}, {"question": {}}, []):
            assert httpx.post(f"{server.url}{path}", json=body).status_code == 400


def test_text_goes_to_tokens_and_back(server: ServerProcess) -> None:
    for text in ("2+2=4", "é 日本\u2028<|im_end|>", ""):
        ids = tokenize(server, prompt=text)
        assert httpx.post(f"{server.url}/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [2]}).json() == {"prompt": "<|im_end|>"}
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [2048]}).status_code == 400


def test_a_small_server_says_no_by_class_until_it_is_gone(start_server: Callable[..., ServerProcess]) -> None:
    """Keys, a full queue, a keep-alive comment on a long wait, and a signal while a stream is under way."""
    small = start_server(
        *("--max-rows", "1", "--max-queue", "1", "--max-messages", "2", "--max-n", "2", "--drain-seconds", "1"),
        *("--api-key", "one", "two", "--keep-alive-seconds", "0.05", "--max-draft-tokens", "0"),
    )
    endless = {"ignore_eos": True, "max_tokens": 4000, "supervision_steps": 16}
    with connect(small, "two") as client, connect(small, "wrong") as stranger:
        with pytest.raises(openai.AuthenticationError) as unknown:
            Completions(stranger).ask()
        with pytest.raises(openai.BadRequestError, match="--max-n"):
            Completions(client).ask(n=3)
        with pytest.raises(openai.BadRequestError, match="--max-messages"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}] * 3)
        assert unknown.value.code == "invalid_api_key"

        stream = Chat(client).ask(stream=True, **endless)
        next(stream)
        waiting = {"json": {**Completions.prompt(BABBLE), "stream": True}, "headers": {"Authorization": "Bearer one"}}
        with httpx.stream("POST", f"{small.url}/v1/completions", **waiting) as waits:  # type: ignore[arg-type]
            lines = waits.iter_lines()  # an iterator that is dropped closes the connection
            assert next(lines) == ": keep-alive"
            with pytest.raises(openai.RateLimitError) as full:
                Completions(client).ask()
        assert full.value.code == "queue_full"
        assert int(full.value.response.headers["retry-after"]) >= 1

        small.process.terminate()
        while httpx.get(f"{small.url}/ready").status_code == 200:
            pass
        with pytest.raises(openai.InternalServerError) as draining:
            Completions(client).ask()
        assert (draining.value.status_code, draining.value.code) == (503, "draining")
        with pytest.raises(openai.APIError) as cut:
            list(stream)
        assert cut.value.code == "draining"
    assert small.process.wait(timeout=20) == 0
