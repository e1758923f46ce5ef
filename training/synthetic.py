r"""Word problems made from a seed: templated, one to four steps, with their solutions.

Two splits that never meet. `train` uses the sentences listed first in each bank and
seven eighths of all number combinations; `heldout` uses the remaining eighth of the
combinations, and every one of its problems holds at least one sentence that no
training problem contains. Problem `i` of a seed depends on (split, seed, i) alone.

A family is a function from a `Draw` (the dice, the words) to question sentences;
arithmetic is recorded as it is done, so that question and solution cannot disagree.
Raises ConfigError for an unknown family.

Markup in sentences: `[present|past]` follows the tense of the story, `{A}` is the
first person's name and `{s} {S} {p} {him}` the pronouns, `{B}` another person,
`{o}` the plural noun, `{X}` and `{Y}` counted nouns ("5 more apples"; "5 of them").
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from training.problem import Problem
from trm.errors import ConfigError

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 8  # one number combination in this many belongs to the held-out split
MAX_NUMBER = 100  # the largest operand of a sum in a question


@dataclass(frozen=True)
class Bank:
    """Sentences for one purpose: those that training sees, and those kept for evaluation."""

    seen: tuple[str, ...]
    heldout: tuple[str, ...] = ()


# --- words -----------------------------------------------------------------------------

SHE = ("she", "her", "her")
HE = ("he", "his", "him")
WOMEN = """
Anna Emma Julia Maria Sara Lily Mia Zoe Nina Kate Amy Lisa Laura Grace Rosa Janet Betty Susan Linda Karen
Alice Jane Mary Lucy Sophie Ella Natalia Olivia Hannah Rachel
""".split()  # noqa: SIM905 - a list of strings would be unreadable
MEN = """
Tom Ben Sam Max Leo Jack Paul Mark John Peter David Omar Ivan Luis Carlos James Bob Tim Mike Adam
Noah Eric Alex Henry Daniel Jake Josh Ryan Kevin Ali
""".split()  # noqa: SIM905
TRADES = ("farmer", "teacher", "baker", "student", "gardener", "shopkeeper", "child", "cook", "driver")
RELATIVES = ("sister", "brother", "friend", "mother", "father", "cousin", "neighbor", "uncle", "aunt")
FOODS = """
apple apples, orange oranges, banana bananas, cookie cookies, candy candies, cake cakes, egg eggs, peach peaches,
pear pears, plum plums, muffin muffins, sweet sweets, grape grapes, carrot carrots, sandwich sandwiches,
chocolate chocolates, cupcake cupcakes, strawberry strawberries, tomato tomatoes, lemon lemons
"""
THINGS = """
book books, pencil pencils, pen pens, marble marbles, toy toys, card cards, sticker stickers, coin coins,
stamp stamps, balloon balloons, flower flowers, ball balls, shell shells, button buttons, crayon crayons,
notebook notebooks, stone stones, shirt shirts, rose roses, doll dolls, ticket tickets, bottle bottles, cup cups,
hat hats, block blocks, car cars, plant plants, magazine magazines, eraser erasers, bracelet bracelets
"""
GOODS: list[tuple[str, str, bool]] = [
    (*pair.split(), edible)  # type: ignore[misc]
    for nouns, edible in ((FOODS, True), (THINGS, False))
    for pair in nouns.split(",")
]  # singular, plural, whether one eats them
HOLDER_NOUNS = """
box boxes, bag bags, basket baskets, jar jars, shelf shelves, row rows, table tables, packet packets, pack packs,
plate plates, drawer drawers, tray trays, crate crates, carton cartons, bucket buckets, case cases
"""
HOLDERS = [pair.split() for pair in HOLDER_NOUNS.split(",")]
SHARERS = ("friends", "children", "students", "kids", "people", "classmates", "neighbors", "boys", "girls")
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905


# --- sentences ---------------------------------------------------------------------------

START = Bank(
    (
        "{A} [has|had] {X}.",
        "{A} [has|had] {X}.",
        "{A} [has|had] {X} in {p} bag.",
        "{A} [starts|started] with {X}.",
        "{A} [owns|owned] {X}.",
        "There [are|were] {X} in {A}'s room.",
        "{A} [has|had] {X} at home.",
        "{A} [collects|collected] {X}.",
        "{A} [picks|picked] {X}.",
        "At first, {A} [has|had] {X}.",
        "In the morning, {A} [has|had] {X}.",
        "{A} [has|had] a box with {X}.",
        "{A} [begins|began] with {X}.",
    ),
    ("There [are|were] {X} in {A}'s bag.", "At home, {A} [has|had] {X}.", "{A} [has|had] {X} in a box."),
)
START_CLAUSE = Bank(
    ("{A} [has|had] {X}", "{A} [starts|started] with {X}", "{A} [has|had] {X} at home", "{A} [owns|owned] {X}"),
    ("at first {A} [has|had] {X}", "in the morning {A} [has|had] {X}"),
)
# What a person does, without the subject; {Y} stands for "5", "5 more apples", "5 of them".
BUYING = Bank(
    (
        "[buys|bought] {Y}",
        "[buys|bought] {Y}",
        "[buys|bought] {Y} at the store",
        "[goes|went] to the shop and [buys|bought] {Y}",
        "[buys|bought] {Y} from {B}",
        "[gets|got] {Y} at the market",
        "[decides|decided] to buy {Y}",
        "[buys|bought] {Y} for {p} {R}",
        "[purchases|purchased] {Y}",
        "[buys|bought] {Y} in the afternoon",
    ),
    (
        "[buys|bought] {Y} at the market",
        "[goes|went] to the store and [gets|got] {Y}",
        "[purchases|purchased] {Y} from {B}",
    ),
)
GETTING = Bank(
    (
        "[gets|got] {Y} from {B}",
        "[finds|found] {Y}",
        "[receives|received] {Y}",
        "[picks|picked] {Y}",
        "[wins|won] {Y}",
        "[collects|collected] {Y}",
        "[gets|got] {Y}",
        "[makes|made] {Y}",
        "[finds|found] {Y} in the park",
        "[is|was] given {Y}",
        "[receives|received] {Y} from {p} {R}",
        "[gets|got] {Y} for {p} birthday",
        "[adds|added] {Y}",
    ),
    ("[receives|received] {Y} for {p} birthday", "[is|was] given {Y} by {B}", "[wins|won] {Y} in the park"),
)
GIVING = Bank(
    (
        "[gives|gave] {Y} to {B}",
        "[gives|gave] {Y} to {B}",
        "[gives|gave] away {Y}",
        "[gives|gave] {B} {Y}",
        "[gives|gave] {Y} to {p} {R}",
        "[gives|gave] {p} {R} {Y}",
        "[donates|donated] {Y}",
        "[sends|sent] {Y} to {B}",
        "[hands|handed] {Y} to {p} {R}",
        "[sells|sold] {Y}",
        "[sells|sold] {Y} to {B}",
        "[lends|lent] {Y} to {B}",
        "[decides|decided] to give {Y} to {B}",
    ),
    ("[hands|handed] {B} {Y}", "[donates|donated] {Y} to {B}", "[decides|decided] to give away {Y}"),
)
LOSING = Bank(
    (
        "[loses|lost] {Y}",
        "[loses|lost] {Y}",
        "[uses|used] {Y}",
        "[breaks|broke] {Y}",
        "[drops|dropped] {Y}",
        "[loses|lost] {Y} in the park",
        "[throws|threw] away {Y}",
        "[leaves|left] {Y} at school",
        "[loses|lost] {Y} on the way home",
        "[uses|used] {Y} at school",
    ),
    ("[loses|lost] {Y} at school", "[drops|dropped] {Y} on the way home"),
)
EATING = Bank(
    ("[eats|ate] {Y}", "[eats|ate] {Y}", "[eats|ate] {Y} for lunch", "[eats|ate] {Y} at school", "[cooks|cooked] {Y}"),
    ("[eats|ate] {Y} on the way home", "[eats|ate] {Y} in the afternoon"),
)
GAIN_SENTENCE = Bank(
    (
        "{B} [gives|gave] {him} {Y}.",
        "{B} [gives|gave] {A} {Y}.",
        "{His} {R} [gives|gave] {him} {Y}.",
        "Then {B} [gives|gave] {him} {Y}.",
        "{B} [buys|bought] {him} {Y}.",
        "{A}'s {R} [gives|gave] {him} {Y}.",
        "{B} [sends|sent] {him} {Y}.",
    ),
    ("Then {p} {R} [gives|gave] {him} {Y}.", "{A}'s {R} [buys|bought] {him} {Y}."),
)
LOSS_SENTENCE = Bank(
    (
        "{B} [takes|took] {Y}.",
        "Then {B} [takes|took] {Y}.",
        "{His} {R} [takes|took] {Y}.",
        "{B} [takes|took] {Y} from {him}.",
        "{A}'s {R} [takes|took] {Y}.",
    ),
    ("{His} {R} [takes|took] {Y} from {him}.", "Later {B} [takes|took] {Y}."),
)
WRAP = Bank(  # {V} is one of the phrases above
    (
        "{S} {V}.",
        "{S} {V}.",
        "Then {s} {V}.",
        "{A} {V}.",
        "Then {A} {V}.",
        "Later, {s} {V}.",
        "After that, {s} {V}.",
        "{S} then {V}.",
        "The next day, {s} {V}.",
        "On Monday {s} {V}.",
    ),
    ("Later, {A} {V}.", "Now {s} {V}.", "On Monday, {A} {V}.", "After that, {A} {V}."),
)
ASK_TOTAL = Bank(
    (
        "How many {o} does {A} have now?",
        "How many {o} does {s} have now?",
        "How many {o} does {A} have in total?",
        "How many {o} does {s} have in all?",
        "How many {o} does {A} have altogether?",
        "How many {o} does {s} have?",
        "How many {o} are there now?",
        "What is the number of {o} that {A} has now?",
        "Find the total number of {o} {A} has.",
        "Now how many {o} does {A} have?",
    ),
    (
        "How many {o} does {A} have in all?",
        "In total, how many {o} does {s} have?",
        "How many {o} does {s} have altogether now?",
    ),
)
ASK_LEFT = Bank(
    (
        "How many {o} does {A} have left?",
        "How many {o} does {s} have left?",
        "How many {o} are left?",
        "How many {o} does {A} have now?",
        "How many {o} does {s} have now?",
        "How many {o} does {s} still have?",
        "How many {o} remain?",
        "How many does {A} have left?",
        "Find the number of {o} {A} has left.",
        "How many {o} does {A} have?",
    ),
    ("How many {o} does {A} still have?", "How many are left?", "Now how many {o} does {s} have left?"),
)
ASK_CLAUSE = Bank(
    ("how many {o} does {s} have", "how many {o} does {s} have now", "how many {o} are there"),
    ("how many {o} does {s} now have",),
)

TWO_OWNERS = Bank(
    (
        "{A} [has|had] {X} and {B} [has|had] {Y}.",
        "{A} [has|had] {X}. {B} [has|had] {Y}.",
        "{A} [picks|picked] {X} and {B} [picks|picked] {Y}.",
        "{A} [buys|bought] {X} and {B} [buys|bought] {Y}.",
        "{A} [finds|found] {X}. {B} [finds|found] {Y}.",
        "{A} [owns|owned] {X} while {B} [owns|owned] {Y}.",
        "{A} [makes|made] {X}, and {B} [makes|made] {Y}.",
    ),
    ("{A} [collects|collected] {X} and {B} [collects|collected] {Y}.", "{A} [has|had] {X} while {B} [has|had] {Y}."),
)
THIRD_OWNER = Bank(
    ("{C} [has|had] {Z}.", "{C} [has|had] {Z} too.", "Their friend {C} [has|had] {Z}.", "And {C} [has|had] {Z}."),
    ("Then {C} [has|had] {Z}.", "Their friend {C} [finds|found] {Z}."),
)
ASK_TOGETHER = Bank(
    (
        "How many {o} do they have together?",
        "How many {o} do they have in total?",
        "How many {o} do they have altogether?",
        "How many {o} are there in all?",
        "How many {o} do they have?",
        "What is the total number of {o}?",
        "Together, how many {o} do they have?",
    ),
    ("How many {o} do they have in all?", "Altogether, how many {o} do they have?", "Find the total number of {o}."),
)
TWO_KINDS = Bank(
    (
        "{A} [has|had] {n} {k} {o} and {m} {l} {o}.",
        "There [are|were] {n} {k} {o} and {m} {l} {o} in a box.",
        "{A} [buys|bought] {n} {k} {o} and {m} {l} {o}.",
        "A bag [holds|held] {n} {k} {o} and {m} {l} {o}.",
    ),
    ("In a bag there [are|were] {n} {k} {o} and {m} {l} {o}.", "{A} [finds|found] {n} {k} {o} and {m} {l} {o}."),
)
ASK_KINDS = Bank(
    (
        "How many {o} are there in total?",
        "How many {o} are there altogether?",
        "What is the total number of {o}?",
        "How many {o} are there?",
    ),
    ("How many {o} is that in total?", "In all, how many {o} are there?"),
)
GROUPS = Bank(
    (
        "There [are|were] {n} {hs} with {m} {o} in each {h}.",
        "{A} [has|had] {n} {hs} with {m} {o} in each {h}.",
        "{A} [has|had] {n} {hs}. Each {h} [has|had] {m} {o}.",
        "{A} [has|had] {n} {hs} of {o}. There [are|were] {m} {o} in each {h}.",
        "Each {h} [holds|held] {m} {o}. {A} [has|had] {n} {hs}.",
        "{A} [buys|bought] {n} {hs} of {o}. Each {h} [contains|contained] {m} {o}.",
        "There [are|were] {n} {hs}. Each {h} [contains|contained] {m} {o}.",
        "{A} [fills|filled] {n} {hs} with {m} {o} each.",
        "{A} [has|had] {n} {hs} with {m} {o} each.",
        "{A} [puts|put] {m} {o} in each of {n} {hs}.",
        "{A} [buys|bought] {n} {hs} of {m} {o} each.",
        "There [are|were] {m} {o} in each {h}, and {A} [has|had] {n} {hs}.",
    ),
    (
        "{A} [has|had] {n} {hs}. There [are|were] {m} {o} in each {h}.",
        "Each {h} [has|had] {m} {o}, and there [are|were] {n} {hs}.",
        "{A} [fills|filled] {n} {hs}. Each {h} [holds|held] {m} {o}.",
    ),
)
ASK_GROUPS = Bank(
    (
        "How many {o} are there in total?",
        "How many {o} are there in all?",
        "How many {o} does {A} have?",
        "How many {o} does {s} have in total?",
        "How many {o} are there altogether?",
        "What is the total number of {o}?",
        "How many {o} are there?",
    ),
    ("In total, how many {o} are there?", "How many {o} does {A} have altogether?", "How many {o} is that?"),
)
SHARE_START = Bank(
    (
        "{A} [has|had] {X}.",
        "{A} [buys|bought] {X}.",
        "{A} [bakes|baked] {X}.",
        "There [are|were] {X}.",
        "{A} [picks|picked] {X}.",
        "{A} [finds|found] {X}.",
    ),
    ("{A} [collects|collected] {X}.", "{A} [has|had] {X} at home."),
)
SHARE_PEOPLE = Bank(
    (
        "{S} [shares|shared] them equally among {n} {g}.",
        "{S} [shares|shared] them equally with {n} {g}, keeping none.",
        "{S} [divides|divided] them equally among {n} {g}.",
        "{S} [gives|gave] the same number to each of {n} {g}.",
        "{S} [splits|split] them equally between {n} {g}.",
        "They [are|were] shared equally by {n} {g}.",
        "{S} [wants|wanted] to share them equally among {n} {g}.",
        "{A} [divides|divided] the {o} equally between {n} {g}.",
    ),
    (
        "They [are|were] divided equally among {n} {g}.",
        "{A} [shares|shared] the {o} equally between {n} {g}.",
        "{S} [splits|split] the {o} equally among {n} {g}.",
    ),
)
ASK_SHARE = Bank(
    (
        "How many {o} does each one get?",
        "How many {o} does each person get?",
        "How many does each of them get?",
        "How many {o} will each one get?",
        "How many {o} did each of them receive?",
        "How many {o} are there for each?",
        "How many {o} does each of the {g} get?",
    ),
    ("How many {o} does each of them get?", "How many will each person receive?"),
)
SHARE_HOLDERS = Bank(
    (
        "{S} [puts|put] them equally into {n} {hs}.",
        "{S} [puts|put] them into {n} {hs} with the same number in each {h}.",
        "{S} [divides|divided] them equally into {n} {hs}.",
        "{S} [places|placed] the same number in each of {n} {hs}.",
    ),
    ("{S} [places|placed] them equally into {n} {hs}.", "{A} [puts|put] the same number into each of {n} {hs}."),
)
ASK_HOLDER = Bank(
    (
        "How many {o} are in each {h}?",
        "How many {o} does each {h} have?",
        "How many {o} go into each {h}?",
        "How many are there in each {h}?",
    ),
    ("How many {o} are there in each {h}?", "How many {o} are put into each {h}?"),
)
SHARE_SIZES = Bank(
    (
        "{S} [puts|put] them into {hs} of {n}.",
        "{S} [puts|put] {n} {o} in each {h}.",
        "{S} [packs|packed] them in {hs} with {n} {o} each.",
        "Each {h} [holds|held] {n} {o}.",
    ),
    ("{S} [packs|packed] {n} {o} in each {h}.", "{S} [puts|put] them in {hs} with {n} {o} each."),
)
ASK_HOLDERS = Bank(
    (
        "How many {hs} does {s} need?",
        "How many {hs} does {A} fill?",
        "How many {hs} are there?",
        "How many {hs} are needed?",
    ),
    ("How many {hs} does {A} need?", "How many {hs} does {s} fill?"),
)
UNIT_PRICE = Bank(
    (
        "Each {w} costs {P}. {A} [buys|bought] {n} {o}.",
        "{A} [buys|bought] {n} {o} for {P} each.",
        "{A} [buys|bought] {n} {o} that cost {P} each.",
        "One {w} costs {P}. {A} [buys|bought] {n} {o}.",
        "{A} [buys|bought] {n} {o}. Each {w} [costs|cost] {P}.",
        "{A} [buys|bought] {n} {o} at {P} each.",
        "The price of one {w} is {P}. {A} [buys|bought] {n} {o}.",
        "{O} cost {P} each. {A} [buys|bought] {n} {o}.",
        "{A} [wants|wanted] to buy {n} {o}. Each {w} costs {P}.",
    ),
    (
        "{A} [buys|bought] {n} {o}. One {w} [costs|cost] {P}.",
        "The price of each {w} is {P}. {A} [wants|wanted] to buy {n} {o}.",
        "{A} [wants|wanted] to buy {n} {o} that cost {P} each.",
    ),
)
UNIT_QUESTION = Bank(
    (
        "A {w} costs {P}. How much do {n} {o} cost?",
        "If one {w} costs {P}, how much do {n} {o} cost?",
        "{O} cost {P} each. What is the price of {n} {o}?",
        "Each {w} costs {P}. How much do {n} {o} cost in total?",
    ),
    ("If each {w} costs {P}, what is the price of {n} {o}?", "One {w} costs {P}. How much is it for {n} {o}?"),
)
SELLING = Bank(
    (
        "{A} [sells|sold] {n} {o} for {P} each.",
        "{A} [sells|sold] {n} {o} at {P} each.",
        "{A} [earns|earned] {P} for each {w} and [sells|sold] {n} {o}.",
    ),
    ("{A} [sells|sold] {n} {o}. Each {w} [costs|cost] {P}.",),
)
ASK_EARN = Bank(
    (
        "How much money does {A} earn?",
        "How much does {s} earn?",
        "How much money does {s} make?",
        "How many dollars does {A} get?",
    ),
    ("How many dollars does {s} earn?", "How much money does {A} make?"),
)
ASK_COST = Bank(
    (
        "How much does {A} pay?",
        "How much does {s} spend?",
        "How much money does {A} spend?",
        "How much does {s} pay in total?",
        "What is the total cost?",
        "How much does it cost?",
        "How many dollars does {A} spend?",
        "How much does {A} spend in total?",
    ),
    ("How much money does {s} pay?", "What does {A} pay in total?", "How many dollars does {s} pay?"),
)
TWO_PRICES = Bank(
    (
        "A {w} costs {P} and a {v} costs {Q}.",
        "{A} [buys|bought] a {w} for {P} and a {v} for {Q}.",
        "{A} [spends|spent] {P} on a {w} and {Q} on a {v}.",
        "{A} [pays|paid] {P} for a {w} and {Q} for a {v}.",
    ),
    (
        "{A} [buys|bought] a {w} that costs {P} and a {v} that costs {Q}.",
        "{A} [pays|paid] {P} for a {w}. Then {s} [pays|paid] {Q} for a {v}.",
    ),
)
ASK_BOTH = Bank(
    (
        "How much do they cost together?",
        "How much is that in total?",
        "What is the total cost?",
        "How much do both cost?",
    ),
    ("What do they cost in total?", "How much do both cost together?"),
)
PRICE_EXTRA = Bank(
    (
        "{S} also [buys|bought] a {v} for {Q}.",
        "{S} [buys|bought] a {v} for {Q} too.",
        "{S} also [pays|paid] {Q} for a {v}.",
        "A {v} [costs|cost] {Q}, and {s} [buys|bought] one.",
    ),
    ("Then {s} also [buys|bought] a {v} for {Q}.", "{A} also [spends|spent] {Q} on a {v}."),
)
MONEY = Bank(
    (
        "{A} [has|had] {M}.",
        "{A} [goes|went] to the store with {M}.",
        "{A} [saves|saved] {M}.",
        "{A} [gets|got] {M} from {p} {R}.",
    ),
    ("{A} [goes|went] to the shop with {M}.", "{A} [has|had] {M} at home."),
)
SPENDING = Bank(
    (
        "{S} [buys|bought] a {w} for {P}.",
        "{S} [spends|spent] {P} on a {w}.",
        "{S} [pays|paid] {P} for a {w}.",
        "{S} [buys|bought] a {w} that costs {P}.",
        "{S} [gives|gave] {P} to {B}.",
        "{S} [spends|spent] {P}.",
    ),
    ("Then {s} [spends|spent] {P} on a {w}.", "{S} then [buys|bought] a {w} for {P}."),
)
SPENDING_EACH = Bank(
    (
        "{S} [buys|bought] {n} {o} for {P} each.",
        "{S} [buys|bought] {n} {o} that cost {P} each.",
        "{S} [buys|bought] {n} {o}. Each {w} [costs|cost] {P}.",
    ),
    ("{S} [buys|bought] {n} {o} at {P} each.", "Then {s} [buys|bought] {n} {o} for {P} each."),
)
ASK_MONEY = Bank(
    (
        "How much money does {A} have left?",
        "How much money does {s} have left?",
        "How many dollars does {s} have left?",
        "How much does {A} have left?",
        "How much money is left?",
        "How much change does {s} get?",
    ),
    ("How many dollars are left?", "How much does {s} still have?", "How many dollars does {A} have left?"),
)
COMPARE = Bank(
    (
        "{A} [has|had] {X}. {B} [has|had] {d} {more} {o} than {A}.",
        "{A} [has|had] {X}, and {B} [has|had] {d} {more} than {A}.",
        "{B} [has|had] {d} {more} {o} than {A}. {A} [has|had] {X}.",
        "{A} [picks|picked] {X}. {B} [picks|picked] {d} {more} {o} than {A}.",
    ),
    (
        "{A} [has|had] {X}. {B} [has|had] {d} {more} {o} than {p} friend {A}.",
        "{A} [finds|found] {X}. {B} [finds|found] {d} {more} than {A}.",
    ),
)
ASK_OTHER = Bank(
    ("How many {o} does {B} have?", "How many does {B} have?", "What is the number of {o} that {B} has?"),
    ("How many {o} has {B}?",),
)
TIMES = Bank(
    (
        "{A} [has|had] {X}. {B} [has|had] {t} as many {o} as {A}.",
        "{A} [has|had] {X}, and {B} [has|had] {t} as many.",
        "{B} [has|had] {t} as many {o} as {A}. {A} [has|had] {X}.",
        "{A} [makes|made] {X}. {B} [makes|made] {t} as many {o}.",
    ),
    (
        "{A} [finds|found] {X}. {B} [finds|found] {t} as many as {A}.",
        "{A} [has|had] {X} while {B} [has|had] {t} as many.",
    ),
)
RATE = Bank(
    (
        "{A} [reads|read] {n} pages every day for {m} days.#How many pages does {s} read in total?",
        "{A} [works|worked] {m} hours and [earns|earned] ${n} an hour.#How much money does {A} earn?",
        "{A} [runs|ran] {n} miles a day.#How many miles does {s} run in {m} days?",
        "{A} [saves|saved] ${n} every week.#How much money does {A} save in {m} weeks?",
        "A machine makes {n} toys every hour.#How many toys does it make in {m} hours?",
        "{A} [plants|planted] {n} trees each day for {m} days.#How many trees does {A} plant?",
    ),
    (
        "{A} [plants|planted] {n} trees every day.#How many trees does {s} plant in {m} days?",
        "{A} [earns|earned] ${n} every day for {m} days.#How much money does {s} earn in total?",
    ),
)
RATE_EXTRA = Bank(
    (
        "On the last day {s} [does|did] {c} more.",
        "Then {s} [does|did] {c} more.",
        "After that, {s} [does|did] another {c}.",
    ),
    ("Later, {s} [does|did] {c} more.",),
)
COLORS = ("red", "blue", "green", "yellow", "white", "black", "big", "small", "old", "new")


# --- dice ----------------------------------------------------------------------------------


@dataclass
class Draw:
    """The dice and the notebook of one problem.

    Chooses words and numbers, and records the numbers chosen (`key`), the equations
    done (`steps`) and whether a held-out sentence was used (`novel`).
    """

    rng: random.Random
    split: Split
    max_number: int
    key: list[int] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    novel: bool = False

    def __post_init__(self) -> None:
        rng = self.rng
        self.past = rng.random() < 0.4
        self.singular, self.plural, self.edible = rng.choice(GOODS)
        if rng.random() < 0.08:
            self.singular = self._invented().lower()
            self.plural = self.singular + "s"
        self.other_noun = rng.choice(GOODS)[0]
        self.holder, self.holders = rng.choice(HOLDERS)
        woman = rng.random() < 0.5
        names = rng.sample(WOMEN if woman else MEN, 1) + rng.sample(WOMEN + MEN, 3)
        if rng.random() < 0.12:
            names[0] = self._invented()
        name, self.other, self.third = list(dict.fromkeys(names))[:3]
        if rng.random() < 0.1:
            name = "the " + rng.choice((*TRADES, "girl", "woman") if woman else (*TRADES, "boy", "man"))
        self.words = {"A": name, "B": self.other, "C": self.third, "o": self.plural, "O": self.plural.capitalize()}
        self.words |= {"w": self.singular, "v": self.other_noun, "h": self.holder, "hs": self.holders}
        self.words |= dict(zip(("s", "p", "him"), SHE if woman else HE, strict=True))
        self.words |= {"S": self.words["s"].capitalize(), "His": self.words["p"].capitalize()}
        self.words |= {"g": rng.choice(SHARERS), "R": rng.choice(RELATIVES)}

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
            return NUMBER_WORDS[value]
        return str(value)

    def count(self, value: int, noun: str | None = None, plural: str | None = None) -> str:
        return f"{self.written(value)} {(noun or self.singular) if value == 1 else (plural or self.plural)}"

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

    def say(self, bank: Bank, **words: str | int) -> str:
        """A sentence from the bank that this split may use, filled in."""
        use_heldout = self.split == "heldout" and bank.heldout and self.rng.random() < 0.5
        self.novel |= bool(use_heldout)
        template = self.rng.choice(bank.heldout if use_heldout else bank.seen)
        template = re.sub(r"\[([^|\]]*)\|([^\]]*)\]", lambda m: m[2 if self.past else 1], template)
        filled = template.format(**(self.words | {key: str(value) for key, value in words.items()}))
        filled = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", filled)
        return filled if bank in _CLAUSES else filled[0].upper() + filled[1:]

    def calculate(self, a: int, operator: str, b: int) -> int:
        """Do one step of the solution and write it down."""
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
        self.steps.append(f"{a}{operator}{b}={result}")
        return result


_CLAUSES = (BUYING, GETTING, GIVING, LOSING, EATING, START_CLAUSE, ASK_CLAUSE)  # parts of a sentence

# --- families --------------------------------------------------------------------------------


def _event(draw: Draw, have: int, gain: bool, banks: Sequence[Bank]) -> tuple[str, bool, int]:
    """Something happens to `have` things. Returns (words, whether they are a sentence, how many there are now)."""
    if gain:
        amount = draw.operand(low=1)
        words, whole = draw.more(amount), GAIN_SENTENCE
        have = draw.calculate(have, "+", amount)
    else:
        amount = draw.number(1, have - 1)
        words, whole = draw.some(amount), LOSS_SENTENCE
        have = draw.calculate(have, "-", amount)
    others_may_act = GETTING in banks if gain else GIVING not in banks
    if others_may_act and draw.chance(0.2):
        return draw.say(whole, Y=words), True, have
    return draw.say(draw.rng.choice(banks), Y=words), False, have


def _story(draw: Draw, kinds: Sequence[bool], first_banks: Sequence[Bank] | None = None) -> str:
    """Someone has things, then gains (True) or loses (False) some; how many now?"""
    have = draw.operand(low=3 if False in kinds else 2)
    start = draw.count(have)
    losing = (LOSING, EATING) if draw.edible else (LOSING,)
    events = []
    for position, gain in enumerate(kinds):
        banks = (BUYING, GETTING) if gain else (GIVING, *losing)
        if position == 0 and first_banks is not None:
            banks = tuple(b for b in first_banks if b is not EATING or draw.edible)
        if not gain and have < 2:
            gain, banks = True, (BUYING, GETTING)
        words, whole, have = _event(draw, have, gain, banks)
        events.append((words, whole))
    ask = ASK_TOTAL if kinds[-1] else ASK_LEFT
    if not any(whole for _, whole in events) and draw.chance(0.3):
        actions = " and ".join(words for words, _ in events)
        clause = draw.say(START_CLAUSE, X=start)
        match draw.rng.randrange(3):
            case 0:
                return f"{clause[0].upper()}{clause[1:]} and {actions}. {draw.say(ask)}"
            case 1:
                return f"If {clause} and {actions}, {draw.say(ASK_CLAUSE)}?"
            case _:
                return f"{draw.say(ASK_CLAUSE).capitalize()} if {clause} and {actions}?"
    told = [words if whole else draw.say(WRAP, V=words) for words, whole in events]
    return " ".join([draw.say(START, X=start), *told, draw.say(ask)])


def have(draw: Draw) -> str:
    """What two or three people, or two kinds of thing, come to together."""
    a, b = draw.operand(), draw.operand()
    if draw.chance(0.25):
        first, second = draw.rng.sample(COLORS, 2)
        draw.calculate(a, "+", b)
        words = {"k": first, "l": second, "n": draw.written(a), "m": draw.written(b)}
        return f"{draw.say(TWO_KINDS, **words)} {draw.say(ASK_KINDS)}"
    told = [draw.say(TWO_OWNERS, X=draw.count(a), Y=draw.rng.choice((draw.count(b), draw.written(b))))]
    total = draw.calculate(a, "+", b)
    if draw.chance(0.35):
        c = draw.operand()
        told.append(draw.say(THIRD_OWNER, Z=draw.rng.choice((draw.count(c), draw.written(c)))))
        draw.calculate(total, "+", c)
    return " ".join([*told, draw.say(ASK_TOGETHER)])


def _story_family(gain: bool, banks: Sequence[Bank]) -> Callable[[Draw], str]:
    def family(draw: Draw) -> str:
        kinds = [gain] if draw.chance(0.5) else [gain, draw.chance(0.5)]
        return _story(draw, kinds, banks)

    return family


buy = _story_family(True, (BUYING, GETTING))
give = _story_family(False, (GIVING,))
lose = _story_family(False, (LOSING, EATING))


def groups(draw: Draw) -> str:
    """Groups of equal size, perhaps with a few more or fewer afterwards."""
    n, m = draw.factor(), draw.factor()
    told = [draw.say(GROUPS, n=draw.written(n), m=draw.written(m))]
    total = draw.calculate(n, "*", m)
    if draw.chance(0.6):
        return f"{told[0]} {draw.say(ASK_GROUPS)}"
    gain = draw.chance(0.5)
    losing = (LOSING, EATING, GIVING) if draw.edible else (LOSING, GIVING)
    words, whole, _ = _event(draw, total, gain, (BUYING, GETTING) if gain else losing)
    told.append(words if whole else draw.say(WRAP, V=words))
    return " ".join([*told, draw.say(ASK_TOTAL if gain else ASK_LEFT)])


def share(draw: Draw) -> str:
    """Sharing equally, perhaps after a gain or a loss."""
    n, each = draw.factor(), draw.factor()
    total = n * each
    if draw.chance(0.6) or total < 4:
        told = [draw.say(SHARE_START, X=draw.count(total))]
    else:
        gain = draw.chance(0.5)
        amount = draw.number(1, min(draw.max_number, total - 2))
        before = total - amount if gain else total + amount
        draw.calculate(before, "+" if gain else "-", amount)
        told = [draw.say(SHARE_START, X=draw.count(before))]
        phrase = draw.more(amount) if gain else draw.some(amount)
        losing = (GIVING, LOSING, EATING) if draw.edible else (GIVING, LOSING)
        told.append(draw.say(WRAP, V=draw.say(draw.rng.choice((BUYING, GETTING) if gain else losing), Y=phrase)))
    draw.calculate(total, "/", n)
    way, ask = draw.rng.choice(((SHARE_PEOPLE, ASK_SHARE), (SHARE_HOLDERS, ASK_HOLDER), (SHARE_SIZES, ASK_HOLDERS)))
    return " ".join([*told, draw.say(way, n=draw.written(n)), draw.say(ask, n=draw.written(n))])


def price(draw: Draw) -> str:
    """What things cost, and what is left of the money."""
    kind = draw.rng.randrange(6)
    if kind == 0:
        p, q = draw.operand(), draw.operand()
        draw.calculate(p, "+", q)
        return f"{draw.say(TWO_PRICES, P=draw.dollars(p), Q=draw.dollars(q))} {draw.say(ASK_BOTH)}"
    if kind == 1:
        money = draw.operand(low=5)
        p = draw.number(1, money - 1)
        draw.calculate(money, "-", p)
        told = draw.say(SPENDING, P=draw.dollars(p))
        return f"{draw.say(MONEY, M=draw.dollars(money))} {told} {draw.say(ASK_MONEY)}"
    n, p = draw.factor(), draw.factor()
    words = {"n": draw.written(n), "P": draw.dollars(p)}
    cost = draw.calculate(n, "*", p)
    if kind == 2:
        return draw.say(UNIT_QUESTION, **words)
    if kind == 3:
        bank, ask = (SELLING, ASK_EARN) if draw.chance(0.25) else (UNIT_PRICE, ASK_COST)
        return f"{draw.say(bank, **words)} {draw.say(ask)}"
    if kind == 4:
        q = draw.operand()
        draw.calculate(cost, "+", q)
        return " ".join((draw.say(UNIT_PRICE, **words), draw.say(PRICE_EXTRA, Q=draw.dollars(q)), draw.say(ASK_COST)))
    money = cost + draw.number(1, draw.max_number)
    draw.calculate(money, "-", cost)
    return " ".join((draw.say(MONEY, M=draw.dollars(money)), draw.say(SPENDING_EACH, **words), draw.say(ASK_MONEY)))


def compare(draw: Draw) -> str:
    """More than, fewer than; perhaps together."""
    a, more = draw.operand(low=3), draw.chance(0.5)
    d = draw.operand() if more else draw.number(1, a - 1)
    told = draw.say(COMPARE, X=draw.count(a), d=draw.written(d), more="more" if more else "fewer")
    b = draw.calculate(a, "+" if more else "-", d)
    if draw.chance(0.5):
        return f"{told} {draw.say(ASK_OTHER)}"
    draw.calculate(a, "+", b)
    return f"{told} {draw.say(ASK_TOGETHER)}"


def times(draw: Draw) -> str:
    """Twice, half, three times as many; perhaps together."""
    k = draw.rng.choice((2, 2, 3, 4, 5))
    half = k == 2 and draw.chance(0.4)
    a = 2 * draw.number(1, draw.max_number // 2) if half else draw.number(2, max(6, draw.max_number // k))
    told = draw.say(TIMES, X=draw.count(a), t="half" if half else "twice" if k == 2 else f"{draw.written(k)} times")
    b = draw.calculate(a, "/" if half else "*", k)
    if draw.chance(0.5):
        return f"{told} {draw.say(ASK_OTHER)}"
    draw.calculate(a, "+", b)
    return f"{told} {draw.say(ASK_TOGETHER)}"


def rate(draw: Draw) -> str:
    """So much every day, for so many days."""
    n, m = draw.number(2, min(30, draw.max_number)), draw.factor()
    told, ask = draw.say(RATE, n=n, m=m).split("#")
    total = draw.calculate(n, "*", m)
    if draw.chance(0.3):
        c = draw.operand()
        told += " " + draw.say(RATE_EXTRA, c=c)
        draw.calculate(total, "+", c)
    return f"{told} {ask}"


def chain(draw: Draw) -> str:
    """A story of three or four events."""
    return _story(draw, [draw.chance(0.5) for _ in range(draw.rng.choice((3, 3, 4)))])


def ledger(draw: Draw) -> str:
    """Groups, a gain or loss, then equal shares: three steps."""
    n, m, people = draw.factor(), draw.factor(), draw.number(2, 9)
    total = draw.calculate(n, "*", m)
    told = [draw.say(GROUPS, n=draw.written(n), m=draw.written(m))]
    rest = total % people
    gain = rest > 0 and draw.chance(0.5)
    amount = people - rest if gain else rest + people * (total > 2 * people)
    if amount:
        total = draw.calculate(total, "+" if gain else "-", amount)
        phrase = draw.more(amount) if gain else draw.some(amount)
        told.append(draw.say(WRAP, V=draw.say(BUYING if gain else GIVING, Y=phrase)))
    draw.calculate(total, "/", people)
    return " ".join([*told, draw.say(SHARE_PEOPLE, n=people), draw.say(ASK_SHARE, n=people)])


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
}
GROUPS_OF_FAMILIES = {"easy": tuple(EASY), "all": tuple(FAMILIES)}

# --- problems ------------------------------------------------------------------------------------


def parse_families(names: str) -> tuple[str, ...]:
    """Families from a comma-separated list of families and groups ("easy", "all"); empty means all.

    What is named twice comes twice as often.
    """
    families: list[str] = []
    for name in names.split(",") if names else ["all"]:
        if name not in GROUPS_OF_FAMILIES and name not in FAMILIES:
            known = ", ".join((*GROUPS_OF_FAMILIES, *FAMILIES))
            raise ConfigError(f"unknown synthetic family {name!r}; there are {known}")
        families.extend(GROUPS_OF_FAMILIES.get(name, (name,)))
    return tuple(families)


def _belongs(split: Split, family: str, key: Sequence[int]) -> bool:
    heldout = zlib.crc32(f"{family}:{','.join(map(str, key))}".encode()) % HELDOUT_SHARE == 0
    return heldout == (split == "heldout")


def make_problem(families: Sequence[str], split: Split, seed: int, index: int, max_number: int = MAX_NUMBER) -> Problem:
    """Problem `index` of this split and seed; the same arguments give the same problem, always."""
    rng = random.Random(f"{split}/{seed}/{index}/{max_number}")
    family = families[rng.randrange(len(families))]
    while True:
        draw = Draw(rng, split, max_number)
        question = FAMILIES[family](draw)
        if _belongs(split, family, draw.key) and (draw.novel or split == "train"):
            answer = draw.steps[-1].split("=")[1]
            solution = "\n".join([*draw.steps, rf"\boxed{{{answer}}}"])
            return Problem(question, solution, family)


def problems(
    families: Sequence[str], split: Split, seed: int, count: int, max_number: int = MAX_NUMBER
) -> Iterator[Problem]:
    """The first `count` problems of a split and seed."""
    return (make_problem(families, split, seed, index, max_number) for index in range(count))
