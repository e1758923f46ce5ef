"""Streaming text: joined it is the decoded reply, and on the way never half a character nor part of a stop string."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

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


@pytest.fixture(scope="session")
def fallback_chat(llama2_tokenizer: Any) -> ChatFormat:
    return ChatFormat(llama2_tokenizer)


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
    assert text.stopped == "b"


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


# Tokenizers with byte fallback: a run of bytes decodes whole or not at all

SPECIAL, FIRST_BYTE = 2, 3
TEXT_IDS = range(FIRST_BYTE + 256, FIRST_BYTE + 256 + 12)


def of(text: bytes) -> list[int]:
    """The byte tokens of `llama2_tokenizer`."""
    return [FIRST_BYTE + byte for byte in text]


def a(tokenizer: Any, piece: str) -> int:
    found: int = tokenizer.convert_tokens_to_ids(piece)
    return found


# Whole characters, halves, bytes that are never right, texts, special tokens, ids that are no token.
FALLBACK_PIECES = st.one_of(
    st.sampled_from(["é", "€", "🙂", "\n", " ", "A", "ab"]).map(lambda text: of(text.encode())),
    st.sampled_from(["é", "€", "🙂"]).map(lambda text: of(text.encode()[:-1])),
    st.binary(min_size=1, max_size=2).map(of),
    st.sampled_from(TEXT_IDS).map(lambda id_: [id_]),
    st.sampled_from([0, 1, SPECIAL, 10**6]).map(lambda id_: [id_]),
)
FALLBACK_IDS = st.lists(FALLBACK_PIECES, max_size=10).map(lambda pieces: [id_ for piece in pieces for id_ in piece])
ANY_STOP = st.lists(
    st.one_of(
        st.sampled_from(["\n", " ", "a", "ab", "A", "é", "€", "\ufffd", "\ufffd\ufffd", "\ufffda", "A\n", "\n\n"]),
        st.text("aA é\n", min_size=1, max_size=3),
    ),
    max_size=2,
)


def assert_streams(chat: ChatFormat, ids: Sequence[int], stop: Sequence[str]) -> None:
    """Joined it is the text of what was pushed, cut at a stop string; on the way it is never taken back."""
    text = TextStream(chat, stop)
    shown, pushed = "", list[int]()
    for token in ids:
        pushed.append(token)
        shown += text.push(token)
        assert not any(word in shown for word in stop)
        if text.stopped:
            break
    shown += text.finish()
    assert shown == cut(chat.decode(pushed), stop)
    behind = chat.decode(pushed)[len(shown) :]
    assert text.stopped == min((word for word in stop if behind.startswith(word)), default=None, key=len)
    assert text.finish() == ""


NEAR_MARKS = st.text(alphabet="ab<>\n", max_size=20)


@PROPERTY
@given(NEAR_MARKS, NEAR_MARKS, st.sampled_from(["b", "\n", "a\nb"]))
def test_stop_strings_are_looked_for_up_to_a_mark(chat, before, behind, stop):
    ids = chat.encode_text(f"{before}<call>{behind}")
    text = TextStream(chat, [stop], stop_before="<call>")

    shown = "".join(map(text.push, ids)) + text.finish()

    found = f"{before}<call>".find(stop)
    if found >= 0:
        assert (shown, text.stopped) == (before[:found], stop)
    else:
        assert (shown, text.stopped) == (f"{before}<call>{behind}", None)


@settings(PROPERTY, max_examples=1500)
@given(FALLBACK_IDS, ANY_STOP)
@example(of(b"A\xff"), [])  # the text of the first byte is not what it seems
@example(of(b"\n\xe2\x82"), [])  # ends inside a run
@example(of(b"\n\xe2\x82"), ["\n"])
@example([*of(b"\n\xe2"), SPECIAL, *of(b"\x82\xac")], [])  # a special token parts no run
@example([*of(b" \xff"), TEXT_IDS[3]], [])  # nor does a run that fails lose its first space
@example([*of(b"\xff"), TEXT_IDS[0], TEXT_IDS[3]], [])
@example([TEXT_IDS[8], *of(b"\xac"), TEXT_IDS[1]], [])  # a piece that is itself U+FFFD
def test_reply_with_bytes_joins_to_the_decoded_reply(fallback_chat, ids, stop):
    assert_streams(fallback_chat, ids, stop)


@settings(PROPERTY, max_examples=1500)
@given(st.lists(st.integers(0, FIRST_BYTE + 256 + 15), max_size=25), ANY_STOP)
def test_any_ids_with_bytes_join_to_the_decoded_reply(fallback_chat, ids, stop):
    assert_streams(fallback_chat, ids, stop)


@PROPERTY
@given(st.one_of(IDS, BYTES), ANY_STOP)
def test_any_ids_with_stop_strings_join_to_the_decoded_reply(chat, ids, stop):
    assert_streams(chat, ids, stop)


@settings(PROPERTY, max_examples=100)
@given(st.one_of(st.lists(st.integers(0, 151_656), max_size=25), BYTES), ANY_STOP)
def test_any_ids_of_the_real_tokenizer_with_stop_strings_join_to_the_decoded_reply(qwen2_tokenizer, ids, stop):
    assert_streams(ChatFormat(qwen2_tokenizer), ids, stop)


def test_run_of_bytes_is_shown_when_it_is_over_or_cannot_be_right_any_more(fallback_chat, llama2_tokenizer):
    letter = a(llama2_tokenizer, "a")

    assert stream(fallback_chat, [letter, *of(b"\n"), letter]) == ["a", "", "\na", ""]
    assert stream(fallback_chat, [letter, *of(b"\n\xff"), *of(b"A"), letter]) == [
        "a",
        "",
        "\ufffd" * 2,
        "\ufffd",
        "a",
        "",
    ]
    assert stream(fallback_chat, [letter, *of("€".encode())]) == ["a", "", "", "", "€"]


def test_stop_string_inside_a_run_of_bytes_ends_the_reply_at_once(fallback_chat, llama2_tokenizer):
    """Llama 2 has no other token for a new line, and people stop there."""
    ids = [a(llama2_tokenizer, "a"), *of(b"\n")]

    assert stream(fallback_chat, [*ids, a(llama2_tokenizer, "b")], ["\n"]) == ["a", "", ""]


@pytest.mark.parametrize("kind", ["chat", "fallback_chat"])
@pytest.mark.parametrize(
    "run",
    [b"A" * 600, b"\xff" * 600, "€".encode() * 200, b"A" * 300 + b"\xff" + b"B" * 299],
    ids=lambda run: run[-1:].hex(),
)
def test_what_a_byte_costs_does_not_grow_with_their_number(kind, run, request, monkeypatch):
    """A reply may be forced to be bytes that are no character, alone."""
    chat = request.getfixturevalue(kind)
    decoded: list[int] = []
    decode = TextStream._decode
    monkeypatch.setattr(TextStream, "_decode", lambda self, ids: (decoded.append(len(ids)), decode(self, ids))[1])
    level = bytes_to_unicode()
    ids = of(run) if kind == "fallback_chat" else [a(chat.tokenizer, level[byte]) for byte in run]

    assert_streams(chat, ids, ["zz"])

    assert sum(decoded) < 20 * len(run)
