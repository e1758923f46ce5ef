"""What the recursion changed its mind about, in words, whole and streamed."""

import pytest

from server.reasoning import Reasoner
from server.token_bytes import TokenBytes
from tests.server.conftest import END_ID, N_SUPERVISION, byte_ids, byte_tokenizer, read_stream
from trm.engine.request import Event, TokenTrace, Usage

pytestmark = pytest.mark.anyio

URL = "/v1/chat/completions"
# Of each character: what was best after step 0, the backbone's, and after three supervision steps.
STEPS = {"a": "aaaa", "1": "5111", "4": "2944", ";": "x;;;", "?": "yy??", "7": "7777", "m": "xxzz"}
TOLD = {
    "a14a": 'In place of "14" the backbone said "52", step 1 "19", steps 2 to 3 "14".\n',
    "a;?14": (
        'In place of ";?" the backbone said "xy", step 1 ";y", steps 2 to 3 ";?".\n'
        'In place of "14" the backbone said "52", step 1 "19", steps 2 to 3 "14".\n'
    ),
    "714": 'In place of "714" the backbone said "752", step 1 "719", steps 2 to 3 "714".\n',
    "?a?": 'In place of "?" the backbone said "y", step 1 "y", steps 2 to 3 "?".\n' * 2,
    "a7a": "",
    ";m;": 'In place of ";" the backbone said "x", steps 1 to 3 ";".\n' * 2,  # m was chosen by a form, or at random
}


def ids_of(text: str) -> list[int]:
    return byte_ids(text.encode())


def traced(text: str) -> list[tuple[int, TokenTrace]]:
    return [
        (token, tuple(((said, -0.5),) for said in ids_of(STEPS[char])))
        for token, char in zip(ids_of(text), text, strict=True)
    ]


@pytest.mark.parametrize("text", TOLD)
def test_what_changed_is_told_in_the_order_of_the_reply(text: str) -> None:
    reasoner = Reasoner(TokenBytes(byte_tokenizer()))

    told = "".join(reasoner.feed([token]) for token in traced(text)) + reasoner.finish()

    assert told == TOLD[text]
    assert reasoner.finish() == ""


def test_tokens_that_halted_earlier_stay_as_they_are() -> None:
    reasoner = Reasoner(TokenBytes(byte_tokenizer()))
    (one, trace), four = traced("14")

    assert reasoner.feed([(one, trace[:2]), four]) == ""
    assert reasoner.finish() == TOLD["a14a"]


def reply(text: str):
    def script(request):
        def found(token: int, trace: TokenTrace) -> dict[str, object]:
            return {"traces": (trace,)} if request.params.trace else {}

        for (token, trace), char in zip(traced(text), text, strict=True):
            yield Event((token,), char, **found(token, trace))
        yield Event((END_ID,), "", "stop", Usage(3, len(text) + 1, 9), **found(END_ID, (((END_ID, -1.0),),) * 4))

    return script


@pytest.mark.parametrize("text", ["a14a", "a7a", "?14"])
async def test_it_stands_beside_the_reply_under_both_names(client, engine, chat_body, text):
    engine.script = reply(text)
    body = chat_body(include_reasoning=True)

    [choice] = (await client.post(URL, json=body)).json()["choices"]
    streamed = await read_stream(client, URL, body)

    told = {"a14a": TOLD["a14a"], "a7a": None, "?14": TOLD["?a?"][: len(TOLD["?a?"]) // 2] + TOLD["a14a"]}[text]
    assert (choice["message"].get("reasoning"), choice["message"].get("reasoning_content")) == (told, told)
    assert (choice["message"]["content"], choice["trace"]) == (text, None)
    deltas = [event["choices"][0] for event in streamed]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(choice["delta"].get(name, "") for choice in deltas) == (told or "")
    assert "".join(choice["delta"].get("content", "") for choice in deltas) == text
    assert not any("trace" in choice for choice in deltas)
    assert [choice["finish_reason"] for choice in deltas if choice["finish_reason"]] == ["stop"]


async def test_nothing_is_traced_that_nobody_asks_for(client, engine, chat_body):
    engine.script = reply("14")

    for include in (None, False):
        [choice] = (await client.post(URL, json=chat_body(include_reasoning=include))).json()["choices"]
        assert "reasoning" not in choice["message"]
    both = (await client.post(URL, json=chat_body(include_reasoning=True, trace=2))).json()["choices"][0]

    assert [request.params.trace for request in engine.requests] == [None, None, 2]
    assert len(both["trace"]) == 2
    assert both["message"]["reasoning"] == TOLD["a14a"]


async def test_effort_has_two_dialects(client, engine, chat_body):
    low, none = {"effort": "low"}, {"effort": None}
    for fields in (
        *({"reasoning_effort": "low"}, {"reasoning": low}, {"reasoning": none, "reasoning_effort": "low"}),
        *({"reasoning": low, "reasoning_effort": "high"}, {"reasoning": low, "supervision_steps": 4}),
        *({"reasoning": {}}, {}),
    ):
        assert (await client.post(URL, json=chat_body(**fields))).status_code == 200

    steps = [request.params.n_supervision for request in engine.requests]
    assert steps == [*[N_SUPERVISION // 4] * 5, None, None]
