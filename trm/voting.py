"""The majority vote over the replies to one question: the only definition. Knows texts, no model."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from trm.answers import canonical, extract_boxed, key

VOTING_TEMPERATURE = 0.7  # where several samples are asked for and none is given


class Ballot(NamedTuple):
    """What a sample votes for: its answer as it wrote it (`canonical`), and what all spellings of it share (`key`)."""

    answer: str
    key: Hashable


class Vote(NamedTuple):
    """What the samples agree on.

    answer: as its first sample wrote it (`canonical`), None where no sample has a box. votes: per answer so written,
    most first. speaker: index of that first sample, 0 where there is none. agreement: its votes over all samples.
    """

    answer: str | None
    votes: dict[str, int]
    speaker: int
    agreement: float


def ballot(text: str) -> Ballot | None:
    """What a sample votes for, None where it has no box. Takes up to 50 ms of text that is meant to take long."""
    box = extract_boxed(text)
    return None if box is None else Ballot(canonical(box), key(box))


def majority(ballots: Sequence[Ballot | None]) -> Vote:
    """The answer that most samples box; of equally many, the earliest. Only boxed samples vote.

    However two samples write the same answer, they vote for one.
    """
    spelled = _alike(ballots)
    votes = Counter(one for one in spelled if one is not None).most_common()  # ties keep their order
    answer, count = votes[0] if votes else (None, 0)
    return Vote(answer, dict(votes), spelled.index(answer) if votes else 0, count / max(len(ballots), 1))


def decided(ballots: Mapping[int, Ballot | None], n: int) -> bool:
    """Whether the majority of n samples has its answer, however those end that are not in `ballots` yet.

    No rival is stronger than one that gets all the outstanding votes; a new one begins with none.
    """
    if len(ballots) == n:
        return True
    known = sorted(ballots)
    cast = [ballots[index] for index in known]
    leader, votes, *_ = majority(cast)
    if leader is None:
        return False
    outstanding = [index for index in range(n) if index not in ballots]
    spelled = zip(reversed(known), reversed(_alike(cast)), strict=True)
    first = {answer: index for index, answer in spelled if answer is not None}

    def may_win(votes_so_far: int, first_so_far: int) -> bool:
        most, earliest = votes_so_far + len(outstanding), min(first_so_far, outstanding[0])
        return (most, -earliest) > (votes[leader], -first[leader])

    return not (may_win(0, n) or any(may_win(votes[rival], first[rival]) for rival in first if rival != leader))


def _alike(ballots: Sequence[Ballot | None]) -> list[str | None]:
    """Each answer as the first ballot for it has it written."""
    spelling: dict[Hashable, str] = {}
    return [None if one is None else spelling.setdefault(one.key, one.answer) for one in ballots]
