"""Turn messages into token ids, and replies back into text: the only definition.

Training, evaluation and serving all go through here, so a prompt has the same ids
everywhere. Owns the system prompts, the ChatML template, text normalisation and the
label span. Refuses to trust content: a special-token string inside a message is
encoded as ordinary text and cannot forge a turn. Raises BadRequest for messages
that have no rendering and ConfigError for a tokenizer that cannot be used.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from trm.errors import BadRequest, ConfigError
from trm.tools import written

Work = Literal["full", "equations", "none"]  # what a reply shows before its answer

SYSTEM_PROMPTS: dict[Work, str] = {
    "full": r"Please reason step by step, and put your final answer within \boxed{}.",
    "equations": r"Please write only the equations, one per line, and put your final answer within \boxed{}.",
    "none": r"Please answer at once: write only \boxed{} with your final answer in it.",
}
SYSTEM_PROMPT = SYSTEM_PROMPTS["full"]

START_TOKEN = "<|im_start|>"  # opens a turn
END_TOKEN = "<|im_end|>"  # closes a turn, and ends a reply
PAD_TOKEN = "<|endoftext|>"

CHAT_TEMPLATE = r"""
{%- if tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if messages[0].role == 'system' -%}{{- messages[0].content + '\n\n' -}}{%- endif -%}
    {{- 'These functions can be called:\n<tools>' -}}
    {%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}
    {{- '\n</tools>\nA call is written as\n<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' -}}
    {%- elif not (tools and loop.first and message.role == 'system') -%}
        {{- '<|im_start|>' + message.role + '\n' + message.content -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '\n' if message.content or not loop.first -}}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- call.function.arguments | tojson + '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
""".strip()
"""ChatML without defaults, used for tokenizers that bring no template of their own."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Role in a request -> role in the prompt."""

_TYPOGRAPHIC = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201a": "'",
        "\u201b": "'",
        "\u2032": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u201e": '"',
        "\u201f": '"',
        "\u2033": '"',
        "\u2010": "-",
        "\u2011": "-",
        "\u2012": "-",
        "\u2013": "-",
        "\u2014": "-",
        "\u2015": "-",
        "\u2212": "-",
    }
)

Message = Mapping[str, Any]  # role and content, and what only some turns have: name, tool_calls, tool_call_id


def normalize_text(text: str) -> str:
    """Typographic apostrophes, quotes and dashes to ASCII, then NFC."""
    return unicodedata.normalize("NFC", text.translate(_TYPOGRAPHIC))


def solve_messages(question: str, solution: str | None = None, work: Work = "full") -> list[Message]:
    """The conversation that asks `question`, with so much work shown; with `solution`, the one that trains on it."""
    messages: list[Message] = [
        {"role": "system", "content": SYSTEM_PROMPTS[work]},
        {"role": "user", "content": question.strip()},
    ]
    if solution is not None:
        messages.append({"role": "assistant", "content": solution.strip()})
    return messages


ONE_DAY = {  # as Llama 3's template has it where there is no clock: no prompt changes overnight
    "%d": "26", "%-d": "26", "%e": "26", "%j": "208", "%a": "Fri", "%A": "Friday",
    "%m": "07", "%-m": "7", "%b": "Jul", "%B": "July", "%y": "24", "%Y": "2024", "%F": "2024-07-26",
    "%H": "00", "%-H": "0", "%I": "12", "%-I": "12", "%p": "AM", "%M": "00", "%S": "00",
}  # fmt: skip
PIECE_CHARS = 2**14  # of a long text that are read at once, to see whether it is too long
REMEMBERED_TEXTS = 512  # whose ids are kept: the system prompt comes again, a question with its answer too, ...
REMEMBERED_CHARS = 2048  # ... as far as they are no longer than this
CUT_TOKENS = 64  # whose cut may change on either side of where a word was cut in two


class TooLong(BadRequest):
    """A text with more tokens than fit; `param` is the field that holds it."""

    def __init__(self, at_most: int, param: str) -> None:
        message = f"the text has more than {at_most} tokens, all that this server reads; shorten it"
        super().__init__(message, param, "context_length_exceeded")


@dataclass(frozen=True)
class Example:
    """One training conversation. Labels are `ids[label_start:]`, the reply and its end token.

    `ids` ends with the end token: the newline that ChatML adds after it is no label and
    nothing follows it, so it is dropped. `step_replies` are the replies that the problem's intermediate
    results would be, in order, the final answer not among them. `source` says where the row came from.
    """

    ids: tuple[int, ...]
    label_start: int
    step_replies: tuple[tuple[int, ...], ...] = ()
    source: str = field(default="", compare=False)


class ChatFormat:
    """A tokenizer with its chat template, ready to encode and decode.

    `tokenizer` is a fast transformers tokenizer. With `normalize` (the default) every
    message goes through `normalize_text`; a model trained without it is served without it.
    """

    def __init__(self, tokenizer: Any, normalize: bool = True) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"tokenizer {type(tokenizer).__name__} is not a fast tokenizer; save it with tokenizer.json"
            )
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer names no eos_token, so a reply could never end; set eos_token")
        self.tokenizer = tokenizer
        self.normalize = normalize
        self.template = _default(tokenizer.chat_template)
        self._timeless = _without_clock(self.template)
        self.end_id: int = tokenizer.eos_token_id
        specials = {str(t) for t in tokenizer.all_special_tokens}
        specials |= {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}
        if END_TOKEN in self.template and END_TOKEN in specials:  # base models' eos_token ends documents, not turns
            self.end_id = tokenizer.convert_tokens_to_ids(END_TOKEN)
        longest_first = sorted(specials, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._remembered = lru_cache(REMEMBERED_TEXTS)(lambda text: tuple(self._ids(text)))

    def encode_text(self, text: str, at_most: int | None = None, param: str = "prompt") -> list[int]:
        """Ids of plain text; special-token strings in it become ordinary tokens.

        Raises TooLong where there are more than `at_most` of them and the text is too long to be read whole for that:
        it is read piece by piece, as far as it needs to be. `param` is the field that holds it.
        """
        if at_most is not None and len(text) > PIECE_CHARS:
            certain = 0
            for piece, slack in _pieces(text):
                certain += max(0, len(self.encode_text(piece)) - slack)
                if certain > at_most:
                    raise TooLong(at_most, param)
        return list(self._remembered(text)) if len(text) <= REMEMBERED_CHARS else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def encode_prompt(self, text: str, at_most: int | None = None) -> list[int]:
        """Ids of a prompt without turns: text as in a message, but without template. `at_most`: see `encode_text`."""
        return self.encode_text(self._clean(text, param="prompt"), at_most)

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template shows tools to the model, and has it call them in the form of `trm.tools`."""
        call = {"id": "call", "type": "function", "function": {"name": "probe", "arguments": {"a": 1}}}
        try:
            text = self._render(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
                [{"type": "function", "function": {"name": "sonde", "description": "", "parameters": {}}}],
                add_generation_prompt=True,
            )
        except BadRequest:
            return False
        return "sonde" in text and written("probe", '{"a": 1}') in text

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        at_most: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Ids of a conversation, by default up to where the reply begins. `at_most`: see `encode_text`.

        Special-token strings in what callers bring are swapped for private-use characters while
        the template runs, so that only the template's own specials become special ids.
        `tools`: what the model may call, as templates expect them, {"type": "function", "function": {...}}.
        Raises BadRequest where a role is unknown, the template refuses the conversation or knows no tools.
        """
        for message in messages:
            if message["role"] not in ROLES:
                raise BadRequest(f"role {message['role']!r} is not one of {', '.join(ROLES)}", param="messages")
        calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        if (tools or calls) and not self.knows_tools:
            param = "tools" if tools else "messages"
            raise BadRequest(f"this model's chat template knows no tools; leave them out of {param}", param=param)
        turns = [_mapped(message, lambda text: self._clean(text, "messages")) for message in messages]
        offered = [_mapped(tool, lambda text: self._clean(text, "tools")) for tool in tools]
        guards = self._guards([*_strings(turns), *_strings(offered)])

        def guarded(text: str) -> str:
            return self._specials.sub(lambda match: guards[match[0]], text)

        turns = [_mapped(turn, guarded) | {"role": ROLES[turn["role"]]} for turn in turns]
        text = self._render(turns, [_mapped(tool, guarded) for tool in offered], add_generation_prompt)
        restore = {ord(char): special for special, char in guards.items()}
        at_most = None if len(text) <= PIECE_CHARS else at_most
        ids: list[int] = []
        for piece in self._specials.split(text):
            if at_most is not None and len(ids) > at_most:
                raise TooLong(at_most, "messages")
            if self._specials.fullmatch(piece):
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                ids.extend(self.encode_text(piece.translate(restore), at_most, "messages"))
        return ids

    def _render(self, turns: Sequence[Message], tools: Sequence[Message], add_generation_prompt: bool) -> str:
        """The template's text. Raises BadRequest where the template refuses."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(turns),
                tools=list(tools) or None,
                chat_template=self._timeless,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template may raise anything, jinja's own errors included
            raise BadRequest(f"the chat template refused the messages: {error}", param="messages") from error
        return text

    def encode_example(self, question: str, solution: str, work: Work = "full") -> Example:
        """Ids of a solved problem and where its reply starts, found in the ids themselves."""
        messages = solve_messages(question, solution, work)
        prompt = self.encode(messages[:-1])
        ids = self.encode(messages, add_generation_prompt=False)
        if ids[: len(prompt)] != prompt:
            raise ConfigError(
                "the chat template renders the prompt differently once a reply follows; use another template"
            )
        if self.end_id not in ids[len(prompt) :]:
            raise ConfigError("the chat template does not close the reply with the tokenizer's end token")
        end = ids.index(self.end_id, len(prompt))
        return Example(tuple(ids[: end + 1]), len(prompt))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of *new* token ids, without special tokens; never cut from a longer string."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def decode_with_specials(self, ids: Sequence[int]) -> str:
        """Text of any token ids, special tokens by their names."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _clean(self, text: str, param: str) -> str:
        """A caller's text, normalised where the model wants it so; `param` is the field that holds it."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("the text holds half a surrogate pair, which is not valid Unicode", param=param) from None
        return normalize_text(text) if self.normalize else text

    def _guards(self, contents: Sequence[str]) -> dict[str, str]:
        """For each special string found in the contents, a private-use character that none of them uses."""
        found = {match for content in contents for match in self._specials.findall(content)}
        if not found:
            return {}
        used = set().union(*contents)
        free = (char for char in _private_use() if char not in used)
        return {special: next(free) for special in sorted(found)}


def _default(own: str | Mapping[str, str] | None) -> str:
    """A tokenizer's chat template, of several the default one. Raises ConfigError where none is the default."""
    if not isinstance(own, Mapping):
        return own or CHAT_TEMPLATE
    if "default" not in own:
        raise ConfigError(f"the tokenizer has the chat templates {', '.join(own)}, and none is the default; keep one")
    return own["default"]


def _without_clock(template: str) -> str:
    """The same template, to which every day is that of ONE_DAY."""
    if "strftime_now" not in template:
        return template
    written = "".join(f'|replace("{code}", "{text}")' for code, text in ONE_DAY.items())
    return "{% macro strftime_now(format) %}{{ format" + written + " }}{% endmacro %}\n" + template


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with all its strings changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value


def _strings(value: Any) -> list[str]:
    """All strings of a JSON value, keys included."""
    found: list[str] = []
    _mapped(value, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found


def _pieces(text: str) -> Iterator[tuple[str, int]]:
    """Parts of a text, and by how many tokens each may have more than it has in the whole text.

    Each ends before a space behind a word, if there is one in its last half: there tokenizers cut, too, and at most
    make more of the space. Elsewhere the tokens on both sides of the cut may be others.
    """
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        cut = text.rfind(" ", start + PIECE_CHARS // 2, end) if end < len(text) else -1
        between_words = cut > 0 and not text[cut - 1].isspace()
        end = cut if between_words else end
        yield text[start:end], 2 if between_words else CUT_TOKENS
        start = end


def _private_use() -> Iterator[str]:
    """Private-use characters of the supplementary planes, more than any request can hold distinct."""
    return (chr(code) for code in range(0xF0000, 0x10FFFE))
