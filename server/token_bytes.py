"""The bytes that one token stands for, which need not be whole characters.

A reply's text never comes from here: joined tokens are decoded by `trm.chat`.
"""

from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from trm.engine.detokenizer import byte_tokens

_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}  # how byte-level tokenizers spell bytes
_SPACE_PIECE = "\u2581"  # what the others write for a space


class TokenBytes:
    """Looks tokens of a fast transformers tokenizer up, byte-level (Qwen2, Llama 3) or with byte fallback (Llama 2)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._byte_level = "ByteLevel(" in repr(self._tokenizer.decoder)
        self._byte_of = byte_tokens(tokenizer)
        self._added = {id_: str(token.content) for id_, token in tokenizer.added_tokens_decoder.items()}
        self._special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)

    def __call__(self, token_id: int) -> bytes | None:
        """The token's bytes, a special token's name included; None for an id that the tokenizer gives no token."""
        added = self._added.get(token_id)
        piece = self._piece(token_id) if added is None else added
        if piece is None:
            return None
        if token_id in self._byte_of:
            return bytes([self._byte_of[token_id]])
        if not self._byte_level:
            return piece.replace(_SPACE_PIECE, " ").encode()
        if added is not None or any(char not in _BYTE_OF for char in piece):
            return piece.encode()  # as it is, which is what the decoder does
        return bytes(_BYTE_OF[char] for char in piece)

    def _piece(self, token_id: int) -> str | None:
        try:
            piece: str | None = self._tokenizer.id_to_token(token_id)
        except OverflowError:
            return None
        return piece

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
