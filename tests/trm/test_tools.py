"""Calls in replies: told apart from text, however the text comes in pieces."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trm.tools import Arguments, Call, Called, CallReader, Tools, read_reply, written

TOOLS = Tools((), ())
ADD = written("add", '{"a": 1, "b": "}\\n</tool_call> <tool_call>"}')
REPLIES = {
    "plain text": ("It is 2.\n", ("It is 2.\n", [], False)),
    "a call": (ADD, ("", [Called("add", '{"a": 1, "b": "}\\n</tool_call> <tool_call>"}')], True)),
    "text before a call": (f"Let me see. \n{ADD}", ("Let me see.", [Called("add", ADD[41:-14])], True)),
    "two calls": (
        written("a", "{}") + "\n" + written("b", '{"c": [1]}'),
        ("", [Called("a", "{}"), Called("b", '{"c": [1]}')], True),
    ),
    "cut in the mark": ("So <tool_c", ("So <tool_c", [], False)),
    "cut in the name": ('So\n<tool_call>\n{"name": "ad', ("So", [], False)),
    "cut in the arguments": (
        '<tool_call>\n{"name": "ad", "arguments": {"a": 1',
        ("", [Called("ad", '{"a": 1')], False),
    ),
    "cut in the closing": (ADD[:-13], ("", [Called("add", ADD[41:-14])], False)),
    "cut late in the closing": (ADD[:-1], ("", [Called("add", ADD[41:-14])], False)),
    "cut in nested arguments": (
        written("a", '{"b": {"c": {}}}')[:-15],
        ("", [Called("a", '{"b": {"c": {}}')], False),
    ),
    "cut behind a call": (ADD + "\n<tool", ("", [Called("add", ADD[41:-14])], True)),
    "a mark without a call": ("a <tool_call> b\n", ("a<tool_call> b\n", [], False)),
    "a mark that is none": ("a <tool> b </tool_call> c", ("a <tool> b </tool_call> c", [], False)),
}


@pytest.mark.parametrize("case", REPLIES)
def test_text_and_calls_are_told_apart(case: str) -> None:
    text, expected = REPLIES[case]

    assert read_reply(text, TOOLS) == expected


@given(case=st.sampled_from(sorted(REPLIES)), cuts=st.lists(st.integers(0, 120)))
def test_pieces_tell_the_same_as_the_whole(case: str, cuts: list[int]) -> None:
    text, expected = REPLIES[case]
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    reader, said, calls = CallReader(TOOLS), "", dict[int, list[str]]()

    for start, end in itertools.pairwise(bounds):
        for piece in reader.feed(text[start:end], last=end == len(text)):
            match piece:
                case Call(index, name):
                    assert index == len(calls)
                    calls[index] = [name, ""]
                case Arguments(index, more):
                    assert more
                    calls[index][1] += more
                case str():
                    assert piece
                    said += piece

    assert (said, [Called(*call) for call in calls.values()], reader.calling) == expected


def test_what_is_certain_is_not_held_back() -> None:
    reader = CallReader(TOOLS)

    assert list(reader.feed("So I ask")) == ["So I ask"]
    assert list(reader.feed(' <\n<tool_call>\n{"name": "add", "arguments": {"a"')) == [
        " <", Call(0, "add"), Arguments(0, '{"a"'),
    ]  # fmt: skip
    assert list(reader.feed(": 1")) == [Arguments(0, ": 1")]
    assert list(reader.feed("}")) == []
    assert list(reader.feed("}\n</tool_call>")) == [Arguments(0, "}")]


@pytest.mark.parametrize("text", ["<", "<tool_", "<tool_call>", '<tool_call>\n{"na'])
def test_half_a_tag_is_no_text_where_there_must_be_a_call(text: str) -> None:
    assert read_reply(text, replace(TOOLS, required=True)) == ("", [], False)


@pytest.mark.parametrize(
    ("arguments", "certain"),
    [
        ('{"a": 12, "b": "7"}', {"a": 12, "b": "7"}),
        ('{"a": 12', {}),
        ('{"a": 12,', {"a": 12}),
        ('{"a": 1, "b": -0.5e', {"a": 1}),
        ('{"a": 1, "b": [3, 4', {"a": 1, "b": [3]}),
        ('{"a": "x12', {}),
        ('{"a": true, "b": fal', {"a": True}),
        ('{"a"', {}),
        ("", {}),
        ("[1]", {}),
    ],
)
def test_of_arguments_that_were_cut_what_is_certain_is_read(arguments: str, certain: dict[str, Any]) -> None:
    assert Called("f", arguments).read() == certain
