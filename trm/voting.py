"""The majority vote over the replies to one question: the only definition. Knows texts, no model."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from trm.answers import canonical, extract_boxed

VOTING_TEMPERATURE = 0.7  # where several samples are asked for and none is given


class Vote(NamedTuple):
    """What the samples agree on.

    answer: canonical, None where no sample has a box. votes: per canonical answer, most first. speaker: index of
    the first sample with that answer, 0 where there is none. agreement: its votes over all samples.
    """

    answer: str | None
    votes: dict[str, int]
    speaker: int
    agreement: float


def majority(texts: Sequence[str]) -> Vote:
    """The answer that most samples box; of equally many, the earliest. Only boxed samples vote."""
    boxes = [extract_boxed(text) for text in texts]
    keys = [None if box is None else canonical(box) for box in boxes]
    votes = Counter(key for key in keys if key is not None).most_common()  # ties keep their order
    answer, count = votes[0] if votes else (None, 0)
    return Vote(answer, dict(votes), keys.index(answer) if votes else 0, count / len(texts))
