"""Words and sentences of the synthetic problems: data, no logic.

Each bank lists sentences for one purpose, those that training sees first, then those kept for
evaluation. Held-out sentences use known words only.

Markup in sentences: `[present|past]` follows the tense of the story, `{A}` is the
first person's name and `{s} {S} {p} {him}` the pronouns, `{B}` another person,
`{o}` the plural noun, `{X}` and `{Y}` counted nouns ("5 more apples"; "5 of them").
"""

from dataclasses import dataclass


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

CLAUSES = (BUYING, GETTING, GIVING, LOSING, EATING, START_CLAUSE, ASK_CLAUSE)
"""Banks of parts of sentences, which do not begin with a capital letter."""
