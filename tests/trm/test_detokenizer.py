"""Streaming text: joined it is the decoded reply, and on the way never half a character nor part of a stop string."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trm.chat import ChatFormat
from trm.engine.detokenizer import TextStream

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
VOCABULARY = 2048
WORDS = [
    "👩‍👩‍👧‍👦",
    "한국어",
    "日本語",
    "é",
    "naïve",
    " 7",
    "\n",
    "ab",
    "aab",
    "\U000f0000",
    "boxed{72}",
    "<|im_end|>",
    "\ufffd",
]
# Any ids at all; bytes of characters in any order; real text.
IDS = st.lists(st.integers(0, VOCABULARY - 1), max_size=25)
BYTES = st.lists(st.integers(0, 258), max_size=25)


@pytest.fixture(params=["bundled", "qwen2"])
def any_chat(request: pytest.FixtureRequest) -> ChatFormat:
    name = "tokenizer" if request.param == "bundled" else "qwen2_tokenizer"
    return ChatFormat(request.getfixturevalue(name))


def stream(chat: ChatFormat, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """What each push returned, and finish last; pushing ends at a stop string, as in the engine."""
    text = TextStream(chat, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()]


@PROPERTY
@given(st.one_of(IDS, BYTES))
@example([240, 159, 145, 169])
def test_pieces_join_to_the_decoded_reply(chat, ids):
    assert "".join(stream(chat, ids)) == chat.decode(ids)


@settings(PROPERTY, max_examples=80)
@given(st.one_of(st.lists(st.integers(0, 151_656), max_size=25), BYTES))
def test_pieces_join_to_the_decoded_reply_of_the_real_tokenizer(qwen2_tokenizer, ids):
    chat = ChatFormat(qwen2_tokenizer)

    assert "".join(stream(chat, ids)) == chat.decode(ids)


@PROPERTY
@given(words=st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=8))
def test_text_streams_whole_characters_only(chat, words):
    """An emoji is four bytes, here often four tokens: a client must not see the replacement character for its parts."""
    text = "".join(words).replace("\ufffd", "")
    ids = chat.encode_text(text)

    pieces = stream(chat, ids)

    assert "".join(pieces) == chat.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    "text", ["👩‍👩‍👧‍👦", "한국어", "e\u0301", "𝒳", "क्षि"], ids=["emoji", "korean", "accent", "four-bytes", "hindi"]
)
def test_every_prefix_of_a_split_character_is_held_back(text, any_chat):
    ids = any_chat.encode_text(text)
    pieces = stream(any_chat, ids)

    assert "".join(pieces) == any_chat.decode(ids)
    for count in range(len(ids)):
        assert any_chat.decode(ids).startswith("".join(pieces[:count]))


def test_text_comes_as_soon_as_it_is_certain(any_chat):
    """Without stop strings nothing is held back but half characters: streaming must stream."""
    ids = any_chat.encode_text("The answer is 72.")

    pieces = stream(any_chat, ids)

    assert all(pieces[:-1])
    assert pieces[-1] == ""


def test_unfinished_character_comes_with_finish(chat):
    ids = chat.encode_text("a👩")[:-1]

    pieces = stream(chat, ids)

    assert "".join(pieces) == chat.decode(ids)
    assert "".join(pieces[:-1]) == "a"
    assert "\ufffd" in pieces[-1]


def test_special_tokens_have_no_text_and_part_no_character(chat):
    first, *rest = chat.encode_text("👩")
    ids = [chat.end_id, first, chat.end_id, *rest, chat.end_id]

    assert "".join(stream(chat, ids)) == chat.decode(ids)


@pytest.mark.parametrize("unknown", [VOCABULARY, 151_935, 10**6])
def test_ids_beyond_the_vocabulary_have_no_text_and_do_no_harm(unknown, any_chat):
    """Heads are often wider than their tokenizer: Qwen2 has 151,936 rows and 151,665 tokens."""
    if unknown < len(any_chat.tokenizer):
        pytest.skip("a token of this tokenizer")
    ids = [*any_chat.encode_text("ab"), unknown, *any_chat.encode_text("cd")]

    assert "".join(stream(any_chat, ids)) == any_chat.decode(ids)


# Stop strings


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]


@PROPERTY
@given(text=st.text("ab\n👩", max_size=20), stop=st.text("ab\n👩", min_size=1, max_size=4))
@example(text="aab", stop="ab")
@example(text="aaab", stop="aab")
@example(text="abab", stop="abb")
def test_reply_is_cut_at_a_stop_string_and_never_shows_part_of_it(chat, text, stop):
    ids = chat.encode_text(text)

    pieces = stream(chat, ids, [stop])

    assert "".join(pieces) == cut(text, [stop])
    seen = ""
    for piece in pieces:  # whatever was shown was right to show, whatever had come next
        seen += piece
        assert text.startswith(seen)
        assert stop not in seen


@PROPERTY
@given(text=st.text("abc", max_size=20), stop=st.lists(st.text("abc", min_size=2, max_size=2), min_size=2, max_size=3))
def test_first_of_several_stop_strings_counts(chat, text, stop):
    """Of one length, so that it is clear which comes first."""
    assert "".join(stream(chat, chat.encode_text(text), stop)) == cut(text, stop)


@PROPERTY
@given(text=st.text("abc", max_size=12), stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_stop_string_of_any_length_is_ever_shown(chat, text, stop):
    shown = "".join(stream(chat, chat.encode_text(text), stop))

    assert text.startswith(shown)
    assert not any(word in shown for word in stop)


def byte_ids(chat: ChatFormat, text: str) -> list[int]:
    """One token per character, so that anything longer is split over tokens."""
    return [token for char in text for token in chat.encode_text(char)]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ["STOP"], ["o", "n", "e", " ", "", "", "", "", ""]),
        ("one STO two", ["STOP"], ["o", "n", "e", " ", "", "", "", "STO ", "t", "w", "o", ""]),
        ("STOP", ["STOP"], ["", "", "", "", ""]),
        ("aSTO", ["STOP"], ["a", "", "", "", "STO"]),
        ("aSSTOPb", ["STOP"], ["a", "", "S", "", "", "", ""]),
        ("a\n\nb", ["\n\n"], ["a", "", "", ""]),
    ],
    ids=["found", "almost", "at-once", "unfinished-at-the-end", "restarted", "newlines"],
)
def test_stop_string_split_over_tokens(text, stop, expected, chat):
    assert stream(chat, byte_ids(chat, text), stop) == expected


def test_nothing_follows_a_stop_string(chat):
    text = TextStream(chat, ["b"])

    pieces = [text.push(token) for token in byte_ids(chat, "abcab")]

    assert "".join(pieces) + text.finish() == "a"
    assert text.stopped


def test_stop_string_inside_an_unfinished_ending(chat):
    """The end of the reply shows half a character, which may itself be what was waited for."""
    ids = chat.encode_text("a👩")[:-1]

    assert "".join(stream(chat, ids, ["\ufffd"])) == "a"


def test_streams_do_not_share_state(chat):
    first, second = TextStream(chat), TextStream(chat)
    head, *tail = chat.encode_text("👩")

    pieces: dict[Any, str] = {first: first.push(head), second: second.push(chat.encode_text("x")[0])}
    for token in tail:
        pieces[first] += first.push(token)

    assert pieces == {first: "👩", second: "x"}
