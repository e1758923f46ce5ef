r"""Word problems made from a seed: templated, one to four steps, with their solutions.

Solutions write each step down. A problem of the family `mental` is one of any other family that is
asked for the answer alone, so that everything happens before the first digit is written. It is not
part of "all".

Two splits that never meet. `train` uses the sentences listed first in each bank and
seven eighths of all number combinations; `heldout` uses the remaining eighth of the
combinations, and every one of its problems holds at least one sentence that no
training problem contains. Problem `i` of a seed depends on (split, seed, i) alone.

A family is a function from a `Draw` (the dice, the words) to question sentences;
arithmetic is recorded as it is done, so that question and solution cannot disagree.
Raises ConfigError for an unknown family.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from training.problems import sentences as text
from training.problems.problem import Problem
from trm.answers import boxed
from trm.chat import Work
from trm.errors import ConfigError

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 8  # one number combination in this many belongs to the held-out split
MAX_NUMBER = 100  # the largest operand of a sum in a question


# --- dice ----------------------------------------------------------------------------------


@dataclass
class Draw:
    """The dice and the notebook of one problem of a family.

    Chooses words and numbers, and records the numbers chosen (`key`), the equations
    done (`equations`), and whether a held-out sentence was used (`novel`).
    """

    rng: random.Random
    split: Split
    max_number: int
    family: str
    key: list[int] = field(default_factory=list)
    equations: list[str] = field(default_factory=list)
    novel: bool = False

    def __post_init__(self) -> None:
        rng = self.rng
        self.past = rng.random() < 0.4
        self.singular, self.plural, self.edible = rng.choice(text.GOODS)
        if rng.random() < 0.08:
            self.singular = self._invented().lower()
            self.plural = self.singular + "s"
        self.other_noun = rng.choice(text.GOODS)[0]
        self.holder, self.holders = rng.choice(text.HOLDERS)
        woman = rng.random() < 0.5
        names = rng.sample(text.WOMEN if woman else text.MEN, 1) + rng.sample(text.WOMEN + text.MEN, 3)
        if rng.random() < 0.12:
            names[0] = self._invented()
        name, self.other, self.third = list(dict.fromkeys(names))[:3]
        if rng.random() < 0.1:
            name = "the " + rng.choice((*text.TRADES, "girl", "woman") if woman else (*text.TRADES, "boy", "man"))
        self.words = {"A": name, "B": self.other, "C": self.third, "o": self.plural, "O": self.plural.capitalize()}
        self.words |= {"w": self.singular, "v": self.other_noun, "h": self.holder, "hs": self.holders}
        self.words |= dict(zip(("s", "p", "him"), text.SHE if woman else text.HE, strict=True))
        self.words |= {"S": self.words["s"].capitalize(), "His": self.words["p"].capitalize()}
        self.words |= {"g": rng.choice(text.SHARERS), "R": rng.choice(text.RELATIVES)}

    def _invented(self) -> str:
        """A name nobody has: the reader must not depend on knowing every word."""
        syllables = [
            self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(self.rng.randint(1, 2))
        ]
        return ("".join(syllables) + self.rng.choice("klmnrst")).capitalize()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def number(self, low: int, high: int) -> int:
        """A number for the question, small ones more often; recorded in the key."""
        high = max(low, high)
        if self.rng.random() < 0.5:
            high = max(low, min(high, low + 18))
        value = self.rng.randint(low, high)
        self.key.append(value)
        return value

    def operand(self, low: int = 2) -> int:
        """An operand of a sum."""
        return self.number(low, self.max_number)

    def factor(self) -> int:
        """An operand of a product."""
        return self.number(2, min(12, max(5, self.max_number // 4)))

    def written(self, value: int) -> str:
        """A number as people write it: digits, now and then a word."""
        if 2 <= value <= 12 and self.rng.random() < 0.06:
            return text.NUMBER_WORDS[value]
        return str(value)

    def count(self, value: int) -> str:
        return f"{self.written(value)} {self.noun(value)}"

    def dollars(self, value: int) -> str:
        return f"${value}" if self.rng.random() < 0.6 else f"{value} dollar{'s' * (value != 1)}"

    def more(self, value: int) -> str:
        """What is gained: "5 more apples" in its many forms."""
        n = self.written(value)
        return self.rng.choice(
            (
                f"{n} more {self.noun(value)}",
                f"{n} more",
                f"another {n} {self.noun(value)}",
                f"{n} {self.noun(value)}",
                f"another {n}",
            )
        )

    def some(self, value: int) -> str:
        """What is lost: "5 of them" in its many forms."""
        n = self.written(value)
        return self.rng.choice(
            (f"{n} {self.noun(value)}", f"{n} {self.noun(value)}", n, f"{n} of them", f"{n} of the {self.plural}")
        )

    def noun(self, value: int) -> str:
        return self.singular if value == 1 else self.plural

    def say(self, bank: text.Bank, **words: str | int) -> str:
        """A sentence from the bank that this split may use, filled in."""
        use_heldout = self.split == "heldout" and bank.heldout and self.rng.random() < 0.5
        self.novel |= bool(use_heldout)
        template = self.rng.choice(bank.heldout if use_heldout else bank.seen)
        template = re.sub(r"\[([^|\]]*)\|([^\]]*)\]", lambda m: m[2 if self.past else 1], template)
        filled = template.format(**(self.words | {key: str(value) for key, value in words.items()}))
        filled = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", filled)
        return filled if bank in text.CLAUSES else filled[0].upper() + filled[1:]

    def calculate(self, a: int, operator: str, b: int) -> int:
        """Do one step of the solution and write it down."""
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
        self.equations.append(f"{a}{operator}{b}={result}")
        return result


# --- families --------------------------------------------------------------------------------


def _event(draw: Draw, have: int, gain: bool, banks: Sequence[text.Bank]) -> tuple[str, bool, int]:
    """Something happens to `have` things. Returns (words, whether they are a sentence, how many there are now)."""
    if gain:
        amount = draw.operand(low=1)
        words, whole = draw.more(amount), text.GAIN_SENTENCE
        have = draw.calculate(have, "+", amount)
    else:
        amount = draw.number(1, have - 1)
        words, whole = draw.some(amount), text.LOSS_SENTENCE
        have = draw.calculate(have, "-", amount)
    others_may_act = text.GETTING in banks if gain else text.GIVING not in banks
    if others_may_act and draw.chance(0.2):
        return draw.say(whole, Y=words), True, have
    return draw.say(draw.rng.choice(banks), Y=words), False, have


def _story(draw: Draw, kinds: Sequence[bool], first_banks: Sequence[text.Bank] | None = None) -> str:
    """Someone has things, then gains (True) or loses (False) some; how many now?"""
    have = draw.operand(low=3 if False in kinds else 2)
    start = draw.count(have)
    losing = (text.LOSING, text.EATING) if draw.edible else (text.LOSING,)
    events = []
    for position, gain in enumerate(kinds):
        banks = (text.BUYING, text.GETTING) if gain else (text.GIVING, *losing)
        if position == 0 and first_banks is not None:
            banks = tuple(b for b in first_banks if b is not text.EATING or draw.edible)
        if not gain and have < 2:
            gain, banks = True, (text.BUYING, text.GETTING)
        words, whole, have = _event(draw, have, gain, banks)
        events.append((words, whole))
    ask = text.ASK_TOTAL if kinds[-1] else text.ASK_LEFT
    if not any(whole for _, whole in events) and draw.chance(0.3):
        actions = " and ".join(words for words, _ in events)
        clause = draw.say(text.START_CLAUSE, X=start)
        match draw.rng.randrange(3):
            case 0:
                return f"{clause[0].upper()}{clause[1:]} and {actions}. {draw.say(ask)}"
            case 1:
                return f"If {clause} and {actions}, {draw.say(text.ASK_CLAUSE)}?"
            case _:
                return f"{draw.say(text.ASK_CLAUSE).capitalize()} if {clause} and {actions}?"
    told = [words if whole else draw.say(text.WRAP, V=words) for words, whole in events]
    return " ".join([draw.say(text.START, X=start), *told, draw.say(ask)])


def have(draw: Draw) -> str:
    """What two or three people, or two kinds of thing, come to together."""
    a, b = draw.operand(), draw.operand()
    if draw.chance(0.25):
        first, second = draw.rng.sample(text.COLORS, 2)
        draw.calculate(a, "+", b)
        words = {"k": first, "l": second, "n": draw.written(a), "m": draw.written(b)}
        return f"{draw.say(text.TWO_KINDS, **words)} {draw.say(text.ASK_KINDS)}"
    told = [draw.say(text.TWO_OWNERS, X=draw.count(a), Y=draw.rng.choice((draw.count(b), draw.written(b))))]
    total = draw.calculate(a, "+", b)
    if draw.chance(0.35):
        c = draw.operand()
        told.append(draw.say(text.THIRD_OWNER, Z=draw.rng.choice((draw.count(c), draw.written(c)))))
        draw.calculate(total, "+", c)
    return " ".join([*told, draw.say(text.ASK_TOGETHER)])


def _story_family(gain: bool, banks: Sequence[text.Bank]) -> Callable[[Draw], str]:
    def family(draw: Draw) -> str:
        kinds = [gain] if draw.chance(0.5) else [gain, draw.chance(0.5)]
        return _story(draw, kinds, banks)

    return family


buy = _story_family(True, (text.BUYING, text.GETTING))
give = _story_family(False, (text.GIVING,))
lose = _story_family(False, (text.LOSING, text.EATING))


def groups(draw: Draw) -> str:
    """Groups of equal size, perhaps with a few more or fewer afterwards."""
    n, m = draw.factor(), draw.factor()
    told = [draw.say(text.GROUPS, n=draw.written(n), m=draw.written(m))]
    total = draw.calculate(n, "*", m)
    if draw.chance(0.6):
        return f"{told[0]} {draw.say(text.ASK_GROUPS)}"
    gain = draw.chance(0.5)
    losing = (text.LOSING, text.EATING, text.GIVING) if draw.edible else (text.LOSING, text.GIVING)
    words, whole, _ = _event(draw, total, gain, (text.BUYING, text.GETTING) if gain else losing)
    told.append(words if whole else draw.say(text.WRAP, V=words))
    return " ".join([*told, draw.say(text.ASK_TOTAL if gain else text.ASK_LEFT)])


def share(draw: Draw) -> str:
    """Sharing equally, perhaps after a gain or a loss."""
    n, each = draw.factor(), draw.factor()
    total = n * each
    if draw.chance(0.6) or total < 4:
        told = [draw.say(text.SHARE_START, X=draw.count(total))]
    else:
        gain = draw.chance(0.5)
        amount = draw.number(1, min(draw.max_number, total - 2))
        before = total - amount if gain else total + amount
        draw.calculate(before, "+" if gain else "-", amount)
        told = [draw.say(text.SHARE_START, X=draw.count(before))]
        phrase = draw.more(amount) if gain else draw.some(amount)
        losing = (text.GIVING, text.LOSING, text.EATING) if draw.edible else (text.GIVING, text.LOSING)
        told.append(
            draw.say(text.WRAP, V=draw.say(draw.rng.choice((text.BUYING, text.GETTING) if gain else losing), Y=phrase))
        )
    draw.calculate(total, "/", n)
    way, ask = draw.rng.choice(
        (
            (text.SHARE_PEOPLE, text.ASK_SHARE),
            (text.SHARE_HOLDERS, text.ASK_HOLDER),
            (text.SHARE_SIZES, text.ASK_HOLDERS),
        )
    )
    return " ".join([*told, draw.say(way, n=draw.written(n)), draw.say(ask, n=draw.written(n))])


def price(draw: Draw) -> str:
    """What things cost, and what is left of the money."""
    kind = draw.rng.randrange(6)
    if kind == 0:
        p, q = draw.operand(), draw.operand()
        draw.calculate(p, "+", q)
        return f"{draw.say(text.TWO_PRICES, P=draw.dollars(p), Q=draw.dollars(q))} {draw.say(text.ASK_BOTH)}"
    if kind == 1:
        money = draw.operand(low=5)
        p = draw.number(1, money - 1)
        draw.calculate(money, "-", p)
        told = draw.say(text.SPENDING, P=draw.dollars(p))
        return f"{draw.say(text.MONEY, M=draw.dollars(money))} {told} {draw.say(text.ASK_MONEY)}"
    n, p = draw.factor(), draw.factor()
    words = {"n": draw.written(n), "P": draw.dollars(p)}
    cost = draw.calculate(n, "*", p)
    if kind == 2:
        return draw.say(text.UNIT_QUESTION, **words)
    if kind == 3:
        bank, ask = (text.SELLING, text.ASK_EARN) if draw.chance(0.25) else (text.UNIT_PRICE, text.ASK_COST)
        return f"{draw.say(bank, **words)} {draw.say(ask)}"
    if kind == 4:
        q = draw.operand()
        draw.calculate(cost, "+", q)
        return " ".join(
            (draw.say(text.UNIT_PRICE, **words), draw.say(text.PRICE_EXTRA, Q=draw.dollars(q)), draw.say(text.ASK_COST))
        )
    money = cost + draw.number(1, draw.max_number)
    draw.calculate(money, "-", cost)
    return " ".join(
        (draw.say(text.MONEY, M=draw.dollars(money)), draw.say(text.SPENDING_EACH, **words), draw.say(text.ASK_MONEY))
    )


def compare(draw: Draw) -> str:
    """More than, fewer than; perhaps together."""
    a, more = draw.operand(low=3), draw.chance(0.5)
    d = draw.operand() if more else draw.number(1, a - 1)
    told = draw.say(text.COMPARE, X=draw.count(a), d=draw.written(d), more="more" if more else "fewer")
    b = draw.calculate(a, "+" if more else "-", d)
    if draw.chance(0.5):
        return f"{told} {draw.say(text.ASK_OTHER)}"
    draw.calculate(a, "+", b)
    return f"{told} {draw.say(text.ASK_TOGETHER)}"


def times(draw: Draw) -> str:
    """Twice, half, three times as many; perhaps together."""
    k = draw.rng.choice((2, 2, 3, 4, 5))
    half = k == 2 and draw.chance(0.4)
    a = 2 * draw.number(1, draw.max_number // 2) if half else draw.number(2, max(6, draw.max_number // k))
    told = draw.say(
        text.TIMES, X=draw.count(a), t="half" if half else "twice" if k == 2 else f"{draw.written(k)} times"
    )
    b = draw.calculate(a, "/" if half else "*", k)
    if draw.chance(0.5):
        return f"{told} {draw.say(text.ASK_OTHER)}"
    draw.calculate(a, "+", b)
    return f"{told} {draw.say(text.ASK_TOGETHER)}"


def rate(draw: Draw) -> str:
    """So much every day, for so many days."""
    n, m = draw.number(2, min(30, draw.max_number)), draw.factor()
    told, ask = draw.say(text.RATE, n=n, m=m).split("#")
    total = draw.calculate(n, "*", m)
    if draw.chance(0.3):
        c = draw.operand()
        told += " " + draw.say(text.RATE_EXTRA, c=c)
        draw.calculate(total, "+", c)
    return f"{told} {ask}"


def chain(draw: Draw) -> str:
    """A story of three or four events."""
    return _story(draw, [draw.chance(0.5) for _ in range(draw.rng.choice((3, 3, 4)))])


def ledger(draw: Draw) -> str:
    """Groups, a gain or loss, then equal shares: three steps."""
    n, m, people = draw.factor(), draw.factor(), draw.number(2, 9)
    total = draw.calculate(n, "*", m)
    told = [draw.say(text.GROUPS, n=draw.written(n), m=draw.written(m))]
    rest = total % people
    gain = rest > 0 and draw.chance(0.5)
    amount = people - rest if gain else rest + people * (total > 2 * people)
    if amount:
        total = draw.calculate(total, "+" if gain else "-", amount)
        phrase = draw.more(amount) if gain else draw.some(amount)
        told.append(draw.say(text.WRAP, V=draw.say(text.BUYING if gain else text.GIVING, Y=phrase)))
    draw.calculate(total, "/", people)
    return " ".join([*told, draw.say(text.SHARE_PEOPLE, n=people), draw.say(text.ASK_SHARE, n=people)])


def mental(draw: Draw) -> str:
    """A problem of any other family, of which it becomes one: its steps are for the reader's head."""
    draw.family = draw.rng.choice(WRITTEN)
    return FAMILIES[draw.family](draw)


Family = Callable[[Draw], str]
EASY: dict[str, Family] = {
    "have": have,
    "buy": buy,
    "give": give,
    "lose": lose,
    "groups": groups,
    "share": share,
    "price": price,
}
FAMILIES: dict[str, Family] = EASY | {
    "compare": compare,
    "times": times,
    "rate": rate,
    "chain": chain,
    "ledger": ledger,
    "mental": mental,
}
WRITTEN = tuple(name for name in FAMILIES if name != "mental")
GROUPS_OF_FAMILIES = {"easy": tuple(EASY), "all": WRITTEN}

# --- problems ------------------------------------------------------------------------------------


def parse_families(names: str) -> tuple[str, ...]:
    """Families from a comma-separated list of families and groups ("easy", "all"); empty means all.

    What is named twice, or followed by `*2`, comes twice as often. Raises ConfigError for anything else.
    """
    families: list[str] = []
    for part in names.split(",") if names else ["all"]:
        name, star, times = part.partition("*")
        if name not in GROUPS_OF_FAMILIES and name not in FAMILIES:
            known = ", ".join((*GROUPS_OF_FAMILIES, *FAMILIES))
            raise ConfigError(f"unknown synthetic family {name!r}; there are {known}")
        if star and not re.fullmatch("[1-9][0-9]{0,2}", times):
            raise ConfigError(f"synthetic family {part[:100]!r}: how often must be a whole number from 1 to 999")
        families.extend(GROUPS_OF_FAMILIES.get(name, (name,)) * int(times or 1))
    return tuple(families)


def _belongs(split: Split, family: str, key: Sequence[int]) -> bool:
    heldout = zlib.crc32(f"{family}:{','.join(map(str, key))}".encode()) % HELDOUT_SHARE == 0
    return heldout == (split == "heldout")


def make_problem(families: Sequence[str], split: Split, seed: int, index: int, max_number: int = MAX_NUMBER) -> Problem:
    """Problem `index` of this split and seed; the same arguments give the same problem, always."""
    rng = random.Random(f"{split}/{seed}/{index}/{max_number}")
    family = families[rng.randrange(len(families))]
    while True:
        draw = Draw(rng, split, max_number, family)
        question = FAMILIES[family](draw)
        if _belongs(split, draw.family, draw.key) and (draw.novel or split == "train"):
            steps = tuple(equation.split("=")[1] for equation in draw.equations)
            solution = "\n".join([*draw.equations, boxed(steps[-1])])
            work: Work | None = "none" if family == "mental" else None
            return Problem(question, solution, family, tuple(draw.equations), steps, work)


def problems(
    families: Sequence[str], split: Split, seed: int, count: int, max_number: int = MAX_NUMBER
) -> Iterator[Problem]:
    """The first `count` problems of a split and seed."""
    return (make_problem(families, split, seed, index, max_number) for index in range(count))
