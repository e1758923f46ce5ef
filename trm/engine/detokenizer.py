"""Text of a growing reply: never half a character, never the beginning of a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from trm.chat import ChatFormat


class TextStream:
    """Turns token ids into text as they come.

    What `push` and `finish` return, joined, is `chat.decode` of all ids, cut at the first stop string.
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()) -> None:
        self.chat = chat
        self.stop = tuple(stop)
        self.stopped = False  # a stop string was found; nothing follows
        self._ids: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=True)
        self._decoded = ""  # text of the ids so far, whole characters only
        self._released = 0  # how much of it was returned

    def push(self, token_id: int) -> str:
        """Text that is certain now that `token_id` has come."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        self._decoded += self._stream.step(self.chat.tokenizer.backend_tokenizer, token_id) or ""
        return self._release(final=False)

    def finish(self) -> str:
        """The rest of the text, unfinished characters included."""
        if not self.stopped:
            self._decoded = self.chat.decode(self._ids)
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        start = max(0, self._released - max(map(len, self.stop), default=0))
        found = [at for at in (self._decoded.find(stop, start) for stop in self.stop) if at >= 0]
        if found and not self.stopped:
            self.stopped = True
            self._decoded = self._decoded[: min(found)]
        end = len(self._decoded)
        if not (final or self.stopped):
            end -= max((_begun(stop, self._decoded) for stop in self.stop), default=0)
        text = self._decoded[self._released : end]
        self._released = max(self._released, end)
        return text


def _begun(stop: str, text: str) -> int:
    """How much of `stop`, short of all of it, `text` ends with: it must be held back."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
