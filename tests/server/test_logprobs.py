"""Where tokens begin in a text; what else is said of them is tested through the routes."""

import pytest

from server.logprobs import Offsets
from server.token_bytes import TokenBytes
from trm.chat import ChatFormat


@pytest.mark.parametrize("text", ["12+7=19\nso 2", "é🙂 日本\u2028 x", "a👩b"], ids=ascii)
def test_tokens_begin_where_the_text_before_them_ends(chat, text):
    ids = chat.encode_text(text)
    offsets = Offsets(chat, TokenBytes(chat.tokenizer))

    found = [offsets.next(id_) for id_ in ids]

    for place, offset in enumerate(found):
        before = chat.decode(ids[:place]).rstrip("\ufffd")  # of a character that is not whole yet
        assert text[:offset] == before
    assert found == sorted(found)


def test_special_tokens_take_no_room(chat):
    offsets = Offsets(chat, TokenBytes(chat.tokenizer))
    [letter] = chat.encode_text("a")

    assert [offsets.next(id_) for id_ in (letter, chat.end_id, letter)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("a|<0x0A>|b|b", [0, 1, 2, 3]),
        ("a|<0x0A>|<0x41>|b", [0, 1, 1, 3]),
        ("a|<0xE2>|<0x82>|<0xAC>|\u2581a|b", [0, 1, 1, 1, 2, 4]),
        ("a|<0xE2>|<0x41>|b", [0, 1, 1, 3]),
        ("\u2581a|b", [0, 1]),
    ],
    ids=ascii,
)
def test_tokens_behind_a_run_of_bytes_begin_where_it_ends(data, expected, llama2_tokenizer):
    """The tokens of a run all begin where it does: until it is over nobody knows what they spell."""
    offsets = Offsets(ChatFormat(llama2_tokenizer), TokenBytes(llama2_tokenizer))

    found = [offsets.next(llama2_tokenizer.convert_tokens_to_ids(piece)) for piece in data.split("|")]

    assert found == expected


def test_token_behind_half_a_character_begins_where_that_ends(chat):
    half, letter = chat.encode_text("\u20ac")[0], chat.encode_text("a")[0]
    offsets = Offsets(chat, TokenBytes(chat.tokenizer))

    assert [offsets.next(id_) for id_ in (letter, half, letter, letter)] == [0, 1, 2, 3]
