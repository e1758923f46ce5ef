"""The bytes of single tokens, compared with what the tokenizers decode."""

import copy

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.token_bytes import TokenBytes


@pytest.fixture(params=["tokenizer", "qwen2_tokenizer"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


def test_every_token_spells_what_it_decodes_to(any_tokenizer):
    spelt = TokenBytes(any_tokenizer)

    for id_ in range(0, len(any_tokenizer), 1 + len(any_tokenizer) // 5000):
        assert spelt(id_).decode(errors="replace") == any_tokenizer.decode([id_], skip_special_tokens=False)


@pytest.mark.parametrize("text", ["so 2+2=4", "é🙂 日本\u2028\x00\r\n\t", " \N{COMBINING ACUTE ACCENT}"], ids=ascii)
def test_the_tokens_of_a_text_spell_its_bytes(any_tokenizer, text):
    ids = any_tokenizer(text, add_special_tokens=False)["input_ids"]

    assert b"".join(map(TokenBytes(any_tokenizer), ids)) == text.encode()


def test_special_tokens_are_spelt_out(chat):
    assert TokenBytes(chat.tokenizer)(chat.end_id) == b"<|im_end|>"


def test_added_tokens_are_not_in_the_byte_alphabet(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<\u00e9>"])  # a letter that stands for the byte 0xE9 in other tokens

    assert TokenBytes(own)(len(tokenizer)) == "<\u00e9>".encode()


def test_an_id_beyond_the_tokenizer_has_no_bytes(tokenizer):
    assert TokenBytes(tokenizer)(len(tokenizer)) is None


def test_what_is_not_whole_characters_is_spelt_in_bytes(any_tokenizer):
    spell = TokenBytes(any_tokenizer).spell
    ids = any_tokenizer("so \u2028", add_special_tokens=False)["input_ids"]

    assert [spell(id_) for id_ in ids] == ["so", "bytes:\\x20\\xe2\\x80", "bytes:\\xa8"]
    assert spell(len(any_tokenizer)) == spell(2**70) == ""


def test_byte_fallback():
    pieces = ["<unk>", "\u2581so", "<0xE2>", "\u00e9", "\u2581"]
    backend = Tokenizer(models.BPE({piece: id_ for id_, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    spelt = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))

    assert [spelt(id_) for id_ in range(len(pieces))] == [b"<unk>", b" so", b"\xe2", "\u00e9".encode(), b" "]


def test_tokens_that_fall_back_on_bytes_spell_what_they_decode_to(llama2_tokenizer):
    """An added token is decoded like any other, and a piece may only look like a byte."""
    own = copy.deepcopy(llama2_tokenizer)
    own.add_tokens(["<0xe9>", "\u2581two\u2581words", "<0x4>"])
    spelt, letter = TokenBytes(own), own.convert_tokens_to_ids("a")  # before it, or a first space would be left out

    for id_ in range(len(own)):
        text = own.decode([letter, id_], skip_special_tokens=False)
        assert text == "a" + spelt(id_).decode(errors="replace")
    assert spelt(own.convert_tokens_to_ids("<0xe9>")) == b"\xe9"


def test_pieces_that_look_like_bytes_are_text_where_nothing_falls_back_on_bytes(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<0x41>"])

    assert TokenBytes(own)(len(tokenizer)) == b"<0x41>"
