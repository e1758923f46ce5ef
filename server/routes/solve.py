"""POST /solve: questions in, answers out, by a majority vote over the boxes of n replies."""

from collections.abc import Sequence

from fastapi import APIRouter

from server.decoding import num_samples, sampling_params, submit, usage_body
from server.schemas.solve import Outcome, SolveRequest, SolveResult, SolveResults
from server.serving import CallDep, ServingDep
from server.strict_json import StrictRoute
from trm.answers import find_boxed
from trm.chat import solve_messages
from trm.engine.request import Reply
from trm.voting import VOTING_TEMPERATURE, majority

router = APIRouter(route_class=StrictRoute)


@router.post("/solve")
async def solve(body: SolveRequest, serving: ServingDep, call: CallDep) -> SolveResult | SolveResults:
    """Solve one question, or a list of them all or none."""
    questions = [body.question] if isinstance(body.question, str) else body.question
    n = num_samples(body, serving, len(questions), param="question")
    temperature = body.temperature
    if n > 1 and temperature is None:
        temperature = VOTING_TEMPERATURE
    params = sampling_params(body, serving.engine, temperature=temperature)
    chat = serving.engine.chat
    submission = await submit(
        serving,
        call,
        len(questions),
        lambda: [chat.encode(solve_messages(question)) for question in questions],
        params,
        n,
        param="question",
    )
    replies = await submission.replies()
    results = [vote(replies[first : first + n]) for first in range(0, len(replies), n)]
    for result in results:
        serving.metrics.answers.labels(result.outcome).inc()
    return results[0] if isinstance(body.question, str) else SolveResults(results=results)


def vote(replies: Sequence[Reply]) -> SolveResult:
    """The answer of the majority, told by the first sample that has it.

    Without any box the first sample speaks: "truncated" if it was cut off, by max_tokens or inside a box, else
    "missing".
    """
    winner = majority([reply.text for reply in replies])
    reply = replies[winner.speaker]
    box = find_boxed(reply.text)
    cut_off = winner.answer is None and reply.finish_reason == "length"
    outcome: Outcome = "truncated" if cut_off else box.outcome
    return SolveResult(
        answer=winner.answer,
        outcome=outcome,
        boxed=None if box.value is None else rf"\boxed{{{box.value}}}",
        solution=reply.text,
        votes=winner.votes,
        agreement=winner.agreement,
        finish_reason=reply.finish_reason,
        usage=usage_body([reply.usage for reply in replies], len(replies)),
    )
