"""The majority vote over the replies to one question: the only definition. Knows texts, no model."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from trm.answers import canonical, extract_boxed, key

VOTING_TEMPERATURE = 0.7  # where several samples are asked for and none is given


class Vote(NamedTuple):
    """What the samples agree on.

    answer: as its first sample wrote it (`canonical`), None where no sample has a box. votes: per answer so written,
    most first. speaker: index of that first sample, 0 where there is none. agreement: its votes over all samples.
    """

    answer: str | None
    votes: dict[str, int]
    speaker: int
    agreement: float


def ballot(text: str) -> str | None:
    """What a sample votes for: its answer (`canonical`), None where it has no box."""
    box = extract_boxed(text)
    return None if box is None else canonical(box)


def majority(ballots: Sequence[str | None]) -> Vote:
    """The answer that most samples box; of equally many, the earliest. Only boxed samples vote.

    However two samples write the same answer (`trm.answers.key`), they vote for one.
    """
    spelled = _alike(ballots)
    votes = Counter(one for one in spelled if one is not None).most_common()  # ties keep their order
    answer, count = votes[0] if votes else (None, 0)
    return Vote(answer, dict(votes), spelled.index(answer) if votes else 0, count / max(len(ballots), 1))


def decided(ballots: Mapping[int, str | None], n: int) -> bool:
    """Whether the majority of n samples has its answer, however those end that are not in `ballots` yet.

    No rival is stronger than one that gets all the outstanding votes; a new one begins with none.
    """
    if len(ballots) == n:
        return True
    known = sorted(ballots)
    ballots = dict(zip(known, _alike([ballots[index] for index in known]), strict=True))
    leader, votes, *_ = majority([ballots[index] for index in known])
    if leader is None:
        return False
    outstanding = [index for index in range(n) if index not in ballots]
    first = {answer: index for index in reversed(known) if (answer := ballots[index]) is not None}

    def may_win(votes_so_far: int, first_so_far: int) -> bool:
        most, earliest = votes_so_far + len(outstanding), min(first_so_far, outstanding[0])
        return (most, -earliest) > (votes[leader], -first[leader])

    return not (may_win(0, n) or any(may_win(votes[rival], first[rival]) for rival in first if rival != leader))


def _alike(ballots: Sequence[str | None]) -> list[str | None]:
    """Each ballot as the first of those for the same answer is written."""
    spelling: dict[Hashable, str] = {}
    return [None if one is None else spelling.setdefault(key(one), one) for one in ballots]
