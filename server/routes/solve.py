"""POST /solve: questions in, answers out, by a majority vote over the boxes of n replies; whole or streamed."""

import asyncio
from collections.abc import AsyncIterator, Mapping

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from server.decoding import num_samples, sampling_params, submit, usage_body
from server.metrics import Metrics
from server.schemas.solve import Outcome, SolveEnd, SolveRequest, SolveResult, SolveResults, SolveText, SolveVote
from server.serving import CallDep, ServingDep
from server.streaming import STREAMED, EventStream
from server.strict_json import StrictRoute
from server.worker import Submission
from trm.answers import find_boxed
from trm.chat import solve_messages
from trm.engine.request import Reply
from trm.voting import VOTING_TEMPERATURE, Ballot, ballot, decided, majority

router = APIRouter(route_class=StrictRoute)


@router.post("/solve", response_model=SolveResult | SolveResults, responses=STREAMED)
async def solve(
    body: SolveRequest, serving: ServingDep, call: CallDep
) -> SolveResult | SolveResults | StreamingResponse:
    """Solve one question, or a list of them, all or none."""
    serving = serving.choose(body.model)
    questions = [body.question] if isinstance(body.question, str) else body.question
    n = num_samples(body, serving, len(questions), param="question")
    temperature = body.temperature
    if n > 1 and temperature is None:
        temperature = VOTING_TEMPERATURE
    params = sampling_params(body, serving, temperature=temperature)
    chat = serving.decoder.chat
    submission = await submit(
        serving,
        call,
        len(questions),
        lambda limit: [
            chat.encode(solve_messages(question, work=body.work or "full"), at_most=limit) for question in questions
        ],
        params,
        n,
        param="question",
    )
    events = solving(submission, len(questions), n, bool(body.early_stop), serving.metrics)
    if body.stream:
        contents = (event.model_dump() async for event in events)
        return EventStream(contents, f"solve-{call.id}", serving.settings.keep_alive_seconds)
    results = {event.index: event.result async for event in events if isinstance(event, SolveEnd)}
    if isinstance(body.question, str):
        return results[0]
    return SolveResults(results=[results[index] for index in range(len(questions))])


async def solving(
    submission: Submission, num_questions: int, n: int, early_stop: bool, metrics: Metrics
) -> AsyncIterator[SolveText | SolveVote | SolveEnd]:
    """What happens, question by question as it happens: text or votes, and at the end of each its result."""
    replies: list[dict[int, Reply]] = [{} for _ in range(num_questions)]
    ballots: list[dict[int, Ballot | None]] = [{} for _ in range(num_questions)]
    async for place, event, reply in submission.progress():
        index, sample = divmod(place, n)
        if n == 1 and event.text:
            yield SolveText(index=index, text=event.text)
        if reply is None:
            continue
        replies[index][sample] = reply
        if reply.finish_reason != "cancelled":
            ballots[index][sample] = await asyncio.to_thread(ballot, reply.text)  # nobody waits for a long one
            if n > 1:
                yield vote(index, n, ballots[index])
            if early_stop and decided(ballots[index], n):
                submission.spare(range(index * n, (index + 1) * n))
        if len(replies[index]) == n:
            result = solved(replies[index], ballots[index])
            metrics.answers.labels(result.outcome).inc()
            yield SolveEnd(index=index, result=result)


def vote(index: int, n: int, ballots: Mapping[int, Ballot | None]) -> SolveVote:
    """Where a vote stands."""
    counted = [ballots[sample] for sample in sorted(ballots)]
    winner = majority(counted)
    return SolveVote(
        index=index,
        n=n,
        answer=winner.answer,
        votes=winner.votes,
        samples=len(counted),
        agreement=winner.agreement,
    )


def solved(replies: Mapping[int, Reply], ballots: Mapping[int, Ballot | None]) -> SolveResult:
    """The answer of the majority, told by the first sample that has it. Those without a ballot were cancelled.

    Without any box the first sample speaks: "truncated" if it was cut off, by max_tokens or inside a box, else
    "missing".
    """
    counted = sorted(ballots)
    winner = majority([ballots[sample] for sample in counted])
    reply = replies[counted[winner.speaker]]
    box = find_boxed(reply.text)
    cut_off = winner.answer is None and reply.finish_reason == "length"
    outcome: Outcome = "truncated" if cut_off else box.outcome
    return SolveResult(
        answer=winner.answer,
        outcome=outcome,
        boxed=None if box.value is None else rf"\boxed{{{box.value}}}",
        solution=reply.text,
        votes=winner.votes,
        samples=len(counted),
        agreement=winner.agreement,
        finish_reason=reply.finish_reason,
        usage=usage_body([replies[sample].usage for sample in sorted(replies)], len(replies)),
    )
