"""Choose the tokens of rows from their logits: those of their replies, and those that are drafted behind them.

Says what each token is to be chosen by, and goes on with a row by what was chosen. Knows grammars, stop strings and the
end token; where the logits come from, and who hears of the tokens, it does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from trm.engine.request import FinishReason, TokenLogprobs, TokenTrace
from trm.engine.row import Pass, Row
from trm.engine.sampling import Answer, Ask
from trm.errors import BadRequest, DeviceError, TRMError


@dataclass
class Chosen:
    """The tokens of one pass and what is to be told of them. reason: the reply ends with them; error: it fails."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    traces: list[TokenTrace] = field(default_factory=list)
    reason: FinishReason | None = None
    error: TRMError | None = None


def ask_reply(row: Row, work: Pass) -> list[Ask]:
    """What the tokens at the places of a row's pass are chosen by, each as if the draft before it were the reply."""
    return [_ask(row, work.draft[:place]) for place in range(work.places)]


def ask_draft(row: Row, work: Pass) -> Ask | None:
    """What the token behind a row's draft is chosen by, unless the reply would end there."""
    ask = _ask(row, work.draft)
    return None if ask.follow and (ask.follow.complete or ask.follow.failure) else ask


def take_reply(row: Row, work: Pass, asks: Sequence[Ask], answers: Sequence[Answer], end_id: int) -> Chosen:
    """Go on with a row's reply: take its token, and the ones behind it as long as they are what was drafted."""
    params = row.request.params
    chosen = Chosen()
    for place, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        if not answer.finite:
            chosen.error = DeviceError("the model gave a logit that is not finite; the request was ended")
            break
        if ask.follow and ask.follow.failure:
            field = row.request.grammar.field if row.request.grammar else None
            why = f"{field}: after {len(row.reply)} tokens {ask.follow.failure}"
            chosen.error = BadRequest(why, param=field)
            break
        token = answer.token
        chosen.ids.append(token)
        chosen.text += row.stream.push(token)
        if params.logprobs is not None:
            chosen.logprobs.append(TokenLogprobs(answer.logprob, answer.top[: params.logprobs]))
        if params.trace is not None:
            chosen.traces.append((*work.seen[: work.steps_taken(place)], answer.top[: params.trace]))
        row.take(token)
        row.cached += 1
        row.taken.supervision_steps += work.steps_taken(place)
        if (token == end_id and not params.ignore_eos) or row.stream.stopped or _completes(row, token):
            chosen.reason = "stop"
        elif len(row.reply) >= params.max_tokens:
            chosen.reason = "length"
        if chosen.reason or place == len(work.draft) or token != work.draft[place]:
            break
    return chosen


def take_draft(row: Row, work: Pass, answer: Answer, end_id: int) -> None:
    """Add a token to a row's draft, unless the reply would end with it."""
    if answer.finite and (answer.token != end_id or row.request.params.ignore_eos):
        work.draft.append(answer.token)


def _ask(row: Row, draft: Sequence[int]) -> Ask:
    """What the token behind a row's reply and `draft` is chosen by."""
    position = len(row.request.prompt_ids) + len(row.reply) + len(draft)
    penalties = row.penalties.behind(draft) if row.penalties else None
    return Ask(row.request.params, position, penalties, row.matcher.follow(draft) if row.matcher else None)


def _completes(row: Row, token: int) -> bool:
    """Tell a row's grammar of the token it got, if it has one; whether nothing may follow."""
    if row.matcher is None:
        return False
    row.matcher.advance(token)
    return row.matcher.follow().complete
