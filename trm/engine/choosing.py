"""Choose the tokens of one row from its logits: those of its reply, and those that are drafted behind them.

Knows grammars, stop strings and the end token; where the logits come from, and who hears of the tokens, it does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from trm.engine.request import FinishReason, Follow, TokenLogprobs, TokenTrace
from trm.engine.row import Pass, Row
from trm.engine.sampling import candidates, choose, token_logprobs
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


def choose_reply(
    row: Row, work: Pass, logits: Tensor, best: Sequence[int], finite: Sequence[bool], end_id: int
) -> Chosen:
    """Go on with a row's reply: choose its token, and the ones behind it as long as they are what was drafted.

    logits (C, V), their argmax and whether they are finite, at the places of the row's pass.
    """
    params, follow = row.request.params, None
    chosen = Chosen()
    for place in range(work.places):
        if not finite[place]:
            chosen.error = DeviceError("the model gave a logit that is not finite; the request was ended")
            break
        if row.matcher:
            follow = row.matcher.follow()
            if follow.failure:
                why = f"response_format: after {len(row.reply)} tokens {follow.failure}"
                chosen.error = BadRequest(why, param="response_format")
                break
        token = _next_token(row, logits[place], best[place], (), follow)
        chosen.ids.append(token)
        chosen.text += row.stream.push(token)
        if params.logprobs is not None:
            chosen.logprobs.append(token_logprobs(logits[place], token, params.logprobs))
        if params.trace is not None:
            chosen.traces.append((*work.seen, candidates(logits[place], params.trace)))
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


def choose_draft(row: Row, work: Pass, logits: Tensor, best: int, finite: bool, end_id: int) -> None:
    """Add a token to a row's draft, chosen from the backbone's logits (V,), unless the reply would end there."""
    if not finite:
        return
    follow = row.matcher.follow(work.draft) if row.matcher else None
    if follow and (follow.complete or follow.failure):
        return
    token = _next_token(row, logits, best, work.draft, follow)
    if token != end_id or row.request.params.ignore_eos:
        work.draft.append(token)


def _next_token(row: Row, logits: Tensor, best: int, draft: Sequence[int], follow: Follow | None) -> int:
    """The token behind a row's reply and `draft`. logits (V,), and `best` their argmax."""
    request = row.request
    if request.params.plain_greedy and (follow is None or follow.allows(best)):
        return best
    reply = [*row.reply, *draft] if draft else row.reply
    return choose(logits, request.params, request.prompt_ids, reply, None if follow is None else follow.mask)


def _completes(row: Row, token: int) -> bool:
    """Tell a row's grammar of the token it got, if it has one; whether nothing may follow."""
    if row.matcher is None:
        return False
    row.matcher.advance(token)
    return row.matcher.follow().complete
