"""Calls of functions in replies: how a model writes them, and how they are read again while it does.

The form is that of Qwen's chat templates, a JSON object between two tags:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

Several stand one below the other. A grammar keeps the model to it (`trm.engine.grammar`), to the blank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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

    callable: those that this reply may call. required: it must call one. parallel: it may call several.
    """

    shown: tuple[Function, ...]
    callable: tuple[Function, ...]
    required: bool = False
    parallel: bool = True

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


def written(name: str, arguments: str) -> str:
    """A whole call."""
    return f"{OPENING}{BEFORE_NAME}{name}{BEFORE_ARGUMENTS}{arguments}{CLOSING}"


def read_reply(text: str) -> tuple[str, list[Called], bool]:
    """The text of a finished reply, its calls, and whether it ends with a whole one."""
    reader, said, calls = CallReader(), "", list[Called]()
    for piece in [*reader.feed(text), reader.finish()]:
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

    def __init__(self) -> None:
        self._held = ""
        self._part = "text"  # or a call's "head", or its "arguments"
        self.calls = 0  # that have begun

    @property
    def calling(self) -> bool:
        """Whether there are calls, and the last one is whole."""
        return self.calls > 0 and self._part == "text"

    def feed(self, text: str) -> Iterator[str | Call | Arguments]:
        """What the next piece of the reply brings."""
        self._held += text
        while (found := self._next()) is not None:
            yield from found

    def finish(self) -> str:
        """Text that was held back to the end: it never became a call."""
        held, self._held = self._held, ""
        return held if self._part == "text" and not self.calls else ""

    def _next(self) -> list[str | Call | Arguments] | None:
        """What is certain of the part at hand; None when nothing more is."""
        if self._part == "text":
            said = self._upto(OPENING, "head")
            said = said.rstrip() if self._part == "head" else said
            return [said] if said else None if self._part == "text" else []
        if self._part == "head":
            head, found, after = self._held.partition(BEFORE_ARGUMENTS)
            if not found:
                return None
            self._held, self._part, self.calls = after, "arguments", self.calls + 1
            return [Call(self.calls - 1, head.removeprefix(BEFORE_NAME))]
        said = self._upto(CLOSING, "text")
        return [Arguments(self.calls - 1, said)] if said else None if self._part == "arguments" else []

    def _upto(self, marker: str, next_part: str) -> str:
        """What comes before `marker`, behind which the next part begins; without it, what cannot be part of it.

        Blanks at the end of text are held back, too: before a call they say nothing.
        """
        before, found, after = self._held.partition(marker)
        if found:
            self._held, self._part = after, next_part
            return before
        lengths = range(min(len(before), len(marker) - 1), 0, -1)
        begun = next((length for length in lengths if before.endswith(marker[:length])), 0)
        ready = before[: len(before) - begun]
        ready = ready.rstrip() if self._part == "text" else ready
        self._held = before[len(ready) :]
        return ready
