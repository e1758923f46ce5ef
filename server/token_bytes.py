"""The bytes that one token stands for, which need not be whole characters.

A reply's text never comes from here: joined tokens are decoded by `trm.chat`.
"""

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}  # how byte-level tokenizers spell bytes
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # how the others spell a byte that they have no token for
_SPACE_PIECE = "\u2581"


class TokenBytes:
    """Looks tokens of a fast transformers tokenizer up, byte-level (Qwen2, Llama 3) or with byte fallback (Llama 2)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._byte_level = "ByteLevel(" in repr(self._tokenizer.decoder)
        self._added = {id_: str(token.content) for id_, token in tokenizer.added_tokens_decoder.items()}
        self._special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)

    def __call__(self, token_id: int) -> bytes | None:
        """The token's bytes, a special token's name included; None for an id that the tokenizer gives no token."""
        if token_id in self._added:  # spelt as it is, whatever the alphabet of the others
            return self._added[token_id].encode()
        try:
            piece: str | None = self._tokenizer.id_to_token(token_id)
        except OverflowError:
            return None
        if piece is None:
            return None
        if self._byte_level:
            known = all(char in _BYTE_OF for char in piece)
            return bytes(_BYTE_OF[char] for char in piece) if known else piece.encode()  # as its decoder does
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(match[1])
        return piece.replace(_SPACE_PIECE, " ").encode()

    def spell(self, token_id: int) -> str:
        """The token's text, or `bytes:\\xc3` where it is not whole characters; "" for an id without a token."""
        spelt = self(token_id) or b""
        try:
            return spelt.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)

    def texts(self, count: int) -> list[bytes | None]:
        """What the first `count` ids add to a text; None for special tokens and for ids without a token."""
        return [None if id_ in self._special else self(id_) for id_ in range(count)]
