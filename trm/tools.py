"""Calls of functions in replies: how a model writes them, and how they are read again while it does.

The form is that of Qwen's chat templates, a JSON object between two tags:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

Several stand one below the other. A grammar keeps the model to it (`trm.engine.grammar`), to the blank.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

OPENING = "<tool_call>"
BEFORE_NAME = '\n{"name": "'
BEFORE_ARGUMENTS = '", "arguments": '
CLOSING = "}\n</tool_call>"  # no line of JSON holds a line feed, so that nothing else can look like it


@dataclass(frozen=True)
class Function:
    """What can be called. parameters: the JSON schema of the arguments, an object; None for no arguments."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None

    def described(self) -> dict[str, Any]:
        """As chat templates expect it."""
        parameters = {"type": "object", "properties": {}} if self.parameters is None else dict(self.parameters)
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description or "", "parameters": parameters},
        }


@dataclass(frozen=True)
class Tools:
    """The functions that a model is shown.

    callable: those that this reply may call. required: it must call one. parallel: it may call several. instead: calls
    stand in the place of a text of some form, and not behind any text.
    """

    shown: tuple[Function, ...]
    callable: tuple[Function, ...]
    required: bool = False
    parallel: bool = True
    instead: bool = False

    def described(self) -> list[dict[str, Any]]:
        """As chat templates expect them."""
        return [function.described() for function in self.shown]


@dataclass(frozen=True)
class Call:
    """Call number `index` of a reply begins."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next piece of a call's arguments, which are JSON."""

    index: int
    text: str


@dataclass(frozen=True)
class Called:
    """A call as far as the reply has it."""

    name: str
    arguments: str

    def read(self) -> dict[str, Any]:
        """The arguments as an object; of a call that was cut, what is certain of them."""
        for text, partly in ((self.arguments, False), (_LAST_NUMBER.sub("", self.arguments), True)):
            with contextlib.suppress(ValueError):  # not whole, or nothing is certain
                read = from_json(text, allow_partial=partly)
                return read if isinstance(read, dict) else {}
        return {}


_LAST_NUMBER = re.compile(r"[-+.0-9eE]+\Z")  # which may go on where the text was cut


def written(name: str, arguments: str) -> str:
    """A whole call."""
    return f"{OPENING}{BEFORE_NAME}{name}{BEFORE_ARGUMENTS}{arguments}{CLOSING}"


def read_reply(text: str, tools: Tools | None) -> tuple[str, list[Called], bool]:
    """The text of a finished reply, its calls, and whether it ends with a whole one."""
    if tools is None:
        return text, [], False
    reader, said, calls = CallReader(tools), "", list[Called]()
    for piece in reader.feed(text, last=True):
        match piece:
            case Call(name=name):
                calls.append(Called(name, ""))
            case Arguments(text=more):
                calls[-1] = Called(calls[-1].name, calls[-1].arguments + more)
            case str():
                said += piece
    return said, calls, reader.calling


class CallReader:
    """Tells text and calls of a reply apart, piece by piece. What may still become either is held back."""

    def __init__(self, tools: Tools) -> None:
        self._required = tools.required
        self._held = ""
        self._arguments = ""  # of the call at hand
        self._part = "start" if tools.instead else "text"  # or a call's "head" or "arguments", or "plain" text
        self.calls = 0  # that have begun

    @property
    def calling(self) -> bool:
        """Whether there are calls, and the last one is whole."""
        return self.calls > 0 and self._part == "text"

    def feed(self, text: str, last: bool = False) -> Iterator[str | Call | Arguments]:
        """What the next piece of the reply brings; with the last one comes what was held back."""
        self._held += text
        while (found := self._next()) is not None:
            yield from found
        if last and self._held:
            if self._part == "arguments":
                if not _is_whole(self._arguments):  # else it is the beginning of the closing
                    yield Arguments(self.calls - 1, self._held)
            elif self._part != "head" and not self.calls and not self._required:  # it never became a call
                yield self._held
            self._held = ""

    def _next(self) -> list[str | Call | Arguments] | None:
        """What is certain of the part at hand; None when nothing more is."""
        match self._part:
            case "start":
                if len(self._held) < len(OPENING) and OPENING.startswith(self._held):
                    return None
                self._part = "text" if self._held.startswith(OPENING) else "plain"
                return []
            case "plain":
                said, self._held = self._held, ""
                return [said] if said else None
            case "text":
                said, ended = self._upto(OPENING, "head")
                said = said.rstrip() if ended else said
                return [said] if said else [] if ended else None
            case "head":
                return self._head()
        said, ended = self._upto(CLOSING, "text")
        self._arguments += said
        return [Arguments(self.calls - 1, said)] if said else [] if ended else None

    def _head(self) -> list[str | Call | Arguments] | None:
        if not self._held.startswith(BEFORE_NAME[: len(self._held)]):  # the mark alone makes no call
            self._held, self._part = OPENING + self._held, "plain"
            return []
        head, found, after = self._held.partition(BEFORE_ARGUMENTS)
        if not found:
            return None
        self._held, self._part, self.calls, self._arguments = after, "arguments", self.calls + 1, ""
        return [Call(self.calls - 1, head.removeprefix(BEFORE_NAME))]

    def _upto(self, marker: str, next_part: str) -> tuple[str, bool]:
        """What comes before `marker`, behind which the next part begins; without it, what cannot be part of it. And
        whether it is there.

        Blanks at the end of text are held back, too: before a call they say nothing.
        """
        before, found, after = self._held.partition(marker)
        if found:
            self._held, self._part = after, next_part
            return before, True
        lengths = range(min(len(before), len(marker) - 1), 0, -1)
        begun = next((length for length in lengths if before.endswith(marker[:length])), 0)
        ready = before[: len(before) - begun]
        ready = ready.rstrip() if self._part == "text" else ready
        self._held = before[len(ready) :]
        return ready, False


def _is_whole(text: str) -> bool:
    """Whether it is JSON as it stands."""
    with contextlib.suppress(ValueError):
        from_json(text)
        return True
    return False
