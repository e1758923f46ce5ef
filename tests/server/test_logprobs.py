"""Where tokens begin in a text; what else is said of them is tested through the routes."""

import pytest

from server.logprobs import Offsets


@pytest.mark.parametrize("text", ["12+7=19\nso 2", "é🙂 日本\u2028 x", "a👩b"], ids=ascii)
def test_tokens_begin_where_the_text_before_them_ends(chat, text):
    ids = chat.encode_text(text)
    offsets = Offsets(chat)

    found = [offsets.next(id_) for id_ in ids]

    for place, offset in enumerate(found):
        before = chat.decode(ids[:place]).rstrip("\ufffd")  # of a character that is not whole yet
        assert text[:offset] == before
    assert found == sorted(found)


def test_special_tokens_take_no_room(chat):
    offsets = Offsets(chat)
    [letter] = chat.encode_text("a")

    assert [offsets.next(id_) for id_ in (letter, chat.end_id, letter)] == [0, 1, 1]
