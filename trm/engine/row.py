"""One accepted request on its way through the engine: its place, its tokens, the pass that it is in, what it took.

Touches no tensors. The scheduler gives it its place; the loop moves it on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trm.engine.detokenizer import TextStream
from trm.engine.hosted import Hosted
from trm.engine.penalties import Penalties
from trm.engine.prefix import Prefix
from trm.engine.request import Candidates, Event, Matcher, Request, Usage


@dataclass
class Pass:
    """One pass through the recursion: of the token behind the cached ones, and of what was drafted behind it.

    Its places are that token's, 0, and the drafted ones'.
    """

    step: int = 0  # supervision steps done
    draft: list[int] = field(default_factory=list)
    halted_at: list[int] = field(default_factory=list)  # steps that each place took, 0 while it goes on
    unread: Callable[[], None] | None = None  # notes who halted in the latest step, where nobody has asked yet
    seen: list[Candidates] = field(default_factory=list)  # of a request that is traced: after each step but the last

    @property
    def places(self) -> int:
        """How many tokens it works on."""
        return 1 + len(self.draft)

    def note_halted(self, step: int, halted: Sequence[bool]) -> None:
        """Which of the places had halted after a step, counted from 1."""
        before = self.halted_at or [0] * self.places
        self.halted_at = [
            at or (step if stopped else 0) for at, stopped in zip(before, halted[: len(before)], strict=True)
        ]

    def steps_taken(self, place: int) -> int:
        """Supervision steps behind the answer at a place."""
        return (self.halted_at[place] if self.halted_at else 0) or self.step

    def answered(self, steps: int) -> bool:
        """Whether every place has had its steps, `steps` where it has not halted."""
        return self.step >= steps or (bool(self.halted_at) and all(self.halted_at))


@dataclass
class Taken:
    """What a request has taken so far; see `Usage`."""

    queue_s: float = 0.0
    cached_tokens: int = 0
    supervision_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    passes: int = 0
    pass_steps: int = 0  # supervision steps of all passes, each for all of its places


@dataclass(eq=False)
class Row:
    """One accepted request.

    Its tokens are the prompt, then the reply. `cached` of them have their keys and values in the slot; the token
    after those is the one being worked on, in `work`, and with it the drafted tokens behind it, if any.
    """

    request: Request
    decoder: Hosted  # that decodes it
    steps: int  # of supervision: its effort
    emit: Callable[[Event], None]
    stream: TextStream  # has seen the reply
    prefix: Prefix  # digests of its tokens
    matcher: Matcher | None = field(init=False)  # has seen the reply
    penalties: Penalties | None = field(init=False)  # have seen the reply
    cancelled: bool = False

    # its place, the scheduler's business
    submitted_at: float = 0.0  # by the scheduler's clock
    slot: int = -1
    settled: bool = False  # it is known whose keys and values are taken over
    source: "Row | None" = None  # the row whose prompt must be cached first, up to
    source_length: int = 0

    # its progress, the loop's
    cached: int = 0
    reply: list[int] = field(default_factory=list)
    work: Pass | None = None  # from when its token passes the backbone until the next one is chosen
    taken: Taken = field(default_factory=Taken)

    # what drafting has learnt
    acceptance: float | None = None  # share of drafted tokens that were right, lately
    may_draft: bool = True  # until a draft was not finite

    def __post_init__(self) -> None:
        params, grammar = self.request.params, self.request.grammar
        self.matcher = None if grammar is None else grammar.matcher(may_end=not params.ignore_eos)
        self.penalties = Penalties(params, self.request.prompt_ids) if params.edits_logits else None

    @property
    def to_prefill(self) -> int:
        """Prompt tokens still to be cached before the last one, which decodes like any other token."""
        return max(0, len(self.request.prompt_ids) - 1 - self.cached)

    @property
    def token(self) -> int:
        """The token after the cached ones."""
        prompt = self.request.prompt_ids
        return prompt[self.cached] if self.cached < len(prompt) else self.reply[self.cached - len(prompt)]

    @property
    def cached_ids(self) -> tuple[int, ...]:
        """The tokens whose keys and values lie in the slot."""
        return self.ids(0, self.cached)

    @property
    def thinking(self) -> bool:
        """Whether it is inside the recursion."""
        return self.work is not None

    @property
    def answered(self) -> bool:
        """Whether it has had its steps, and must choose a token now."""
        return self.work is not None and self.work.answered(self.steps)

    @property
    def position_ahead(self) -> int | None:
        """Where the token that is chosen next will lie, if it is the only one, and not the last that may be."""
        drafted = self.work is None or self.work.draft
        return None if drafted or len(self.reply) + 1 >= self.request.params.max_tokens else self.cached + 1

    @property
    def room_for_draft(self) -> int:
        """Tokens that may be drafted behind the next one."""
        if not self.may_draft or self.steps == 0 or self.request.params.trace is not None:
            return 0
        return self.request.params.max_tokens - len(self.reply) - 1

    @property
    def expected_steps(self) -> float:
        """Supervision steps of a pass: the effort, or the mean so far where positions may halt."""
        halts = self.request.params.halts and self.taken.passes
        return self.taken.pass_steps / self.taken.passes if halts else self.steps

    def ids(self, start: int, end: int) -> tuple[int, ...]:
        """Some of its tokens, at most those that there are."""
        prompt = self.request.prompt_ids
        return (*prompt[start:end], *self.reply[max(0, start - len(prompt)) : max(0, end - len(prompt))])

    def take(self, token: int) -> None:
        """Add a token to the reply."""
        self.reply.append(token)
        self.prefix.extend((token,))
        if self.penalties:
            self.penalties.take(token)

    def usage(self) -> Usage:
        """What it has taken, for its events."""
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=len(self.reply),
            supervision_steps=self.taken.supervision_steps,
            cached_tokens=self.taken.cached_tokens,
            draft_tokens=self.taken.draft_tokens,
            accepted_tokens=self.taken.accepted_tokens,
            queue_s=self.taken.queue_s,
        )
