"""Text of a growing reply: never half a character, never the beginning of a stop string.

Two kinds of tokenizer spell in bytes what they have no piece for. To the byte-level ones (Qwen2, Llama 3) every
piece is bytes, and bytes that are no character become U+FFFD where they stand. The others (Llama 2) fall back on
tokens like `<0xE2>`. A run of these decodes whole or not at all: one wrong byte turns every byte of its run into
U+FFFD. So the text of a run is certain only when the run is over, or wrong.
"""

import codecs
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from trm.chat import ChatFormat

REPLACEMENT = "\ufffd"  # stands for bytes that are no character, or not yet
LONGEST_CHARACTER = 4  # bytes, and so tokens
LONGEST_WINDOW = 16  # tokens; behind so many without a whole character only the last few can still become one


class TextStream:
    """Turns token ids into text as they come.

    What `push` and `finish` return, joined, is `chat.decode` of all ids, cut at the first stop string that begins
    before `stop_before`, if the text has that. A token costs the same however long the reply is.
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = (), stop_before: str | None = None) -> None:
        self.chat = chat
        self.stop = tuple(stop)
        self._stop_before = stop_before
        self.stopped: str | None = None  # the stop string that was found; nothing follows
        self._ids: list[int] = []
        self._backend = chat.tokenizer.backend_tokenizer
        self._special = _special_tokens(chat.tokenizer)
        self._byte_of = byte_tokens(chat.tokenizer)
        self._window: list[int] = []  # the latest tokens with text: some to the left of the next one, for the decoder
        self._shown_tokens = 0  # of the window: all their characters are in `_decoded`
        self._shown_chars = 0  # of the window's text: they are in `_decoded`
        self._run: _Run | None = None  # of byte tokens, while the latest token is one
        self._decoded = ""  # text of the ids so far, whole characters only; a run's may be taken back
        self._released = 0  # how much of it was returned

    def push(self, token_id: int) -> str:
        """Text that is certain now that `token_id` has come."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        if token_id not in self._special and self._backend.id_to_token(token_id) is not None:
            self._add(token_id)
        return self._release(final=False)

    def finish(self) -> str:
        """The rest of the text, unfinished characters included."""
        if not self.stopped:
            self._decoded = self.chat.decode(self._ids)
            self._run = None
        return self._release(final=True)

    def _add(self, token_id: int) -> None:
        """Decode one more token, which has text."""
        byte = self._byte_of.get(token_id)
        if byte is None:
            if self._run and self._run.unfinished:
                self._spoil(self._run)
            self._run = None
        else:
            self._run = run = self._run or _Run(len(self._decoded))
            if run.wrong:
                self._decoded += REPLACEMENT
                return
            run.add(byte)
        self._window.append(token_id)
        if self._run and self._run.wrong:
            self._spoil(self._run)
        elif not (self._run and self._run.unfinished):
            self._show()

    def _show(self) -> None:
        """Add the characters at the window's end that are whole, and move the window on."""
        text = self._decode(self._window)
        if self._byte_of or not text.endswith(REPLACEMENT):  # what falls back on bytes has whole pieces
            self._decoded += text[self._shown_chars :]
            self._move(self._window[self._shown_tokens :])
        elif len(self._window) > LONGEST_WINDOW:
            self._decoded += text[self._shown_chars : -1]
            self._move(self._window[-LONGEST_CHARACTER:])
            self._shown_tokens, self._shown_chars = 0, self._shown_chars - 1

    def _spoil(self, run: "_Run") -> None:
        """Take back the text of a run that has turned out wrong."""
        self._decoded = self._decoded[: run.start] + REPLACEMENT * run.length
        self._move(self._window[-1:])

    def _move(self, window: list[int]) -> None:
        """Go on from these tokens, the latest ones; their text is in `_decoded`."""
        self._window = window
        self._shown_tokens, self._shown_chars = len(window), len(self._decode(window))

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def _release(self, final: bool) -> str:
        start = max(0, self._released - max(map(len, (*self.stop, self._stop_before or "")), default=0))
        found = [(at, stop) for stop in self.stop if (at := self._decoded.find(stop, start)) >= 0]
        if self.stop and self._stop_before and (limit := self._decoded.find(self._stop_before, start)) >= 0:
            found = [(at, stop) for at, stop in found if at < limit]
            self.stop = self.stop if found else ()
        if found and not self.stopped:  # be it in a run: if the reply ends here, the run is right
            first, self.stopped = min(found)
            self._decoded = self._decoded[:first]
        end = len(self._decoded)
        if not (final or self.stopped):
            if self._run and not self._run.wrong:
                end = self._run.start
            end -= max((_begun(stop, self._decoded[max(0, end - len(stop)) : end]) for stop in self.stop), default=0)
        text = self._decoded[self._released : end]
        self._released = max(self._released, end)
        return text


class _Run:
    """Byte tokens next to each other, the first at character `start` of the text."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.length = 0
        self.wrong = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    @property
    def unfinished(self) -> bool:
        """Whether it ends inside a character, and may yet be right."""
        return not self.wrong and bool(self._utf8.getstate()[0])

    def add(self, byte: int) -> None:
        self.length += 1
        try:
            self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self.wrong = True


@lru_cache(maxsize=8)
def byte_tokens(tokenizer: Any) -> Mapping[int, int]:
    """Ids of a fast transformers tokenizer that stand for one byte of a run, and that byte."""
    backend = tokenizer.backend_tokenizer
    found = {}
    for digits in map("".join, product("0123456789ABCDEFabcdef", repeat=2)):
        id_ = backend.token_to_id(f"<0x{digits}>")
        if id_ is not None and backend.decode([id_], skip_special_tokens=False) != f"<0x{digits}>":
            found[id_] = int(digits, 16)
    return found


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> frozenset[int]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset(id_ for id_, token in added.items() if token.special)


def _begun(stop: str, text: str) -> int:
    """How much of `stop`, short of all of it, `text` ends with: it must be held back."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
