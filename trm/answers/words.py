"""Which words after a number only say what is counted or measured, and which make it another number.

`18 apples` is 18 and `5 km/h` is 5; `3 sevenths`, `2 millions` and `5 below zero` are not their leading number. A word
that is in neither list is no unit, unless the question asks for it.
"""

import re

_MEASURES = """
    meter metre kilometer kilometre centimeter centimetre millimeter millimetre decimeter km cm mm dm nm inch inches
    foot feet ft yard yd mile mi mph kph kmh gram kilogram milligram kilo kg mg gm gms kgs pound lb lbs ounce oz ton
    tonne liter litre milliliter millilitre ml dl cl gallon quart pint cup tablespoon teaspoon tbsp tsp second sec
    minute min hour hr day week month year yr decade century centuries night weekday morning evening dollar cent
    penny pennies nickel dime buck euro yuan rupee rupees yen peso pfennig usd eur gbp rs degree radian rad celsius
    fahrenheit kelvin percent percentage pct watt kilowatt volt ampere amp ohm joule newton hertz hz calorie byte
    kilobyte megabyte gigabyte mb gb kb acre hectare unit
"""
_COUNTED = """
    people person man men woman women child children kid boy girl baby babies student teacher friend player guest
    member adult parent passenger worker employee visitor customer family families couple group team class classes
    animal dog cat puppy puppies kitten bird chicken hen duck fish cow pig horse sheep goat rabbit bunny bunnies
    bear lion tiger elephant monkey frog turtle snake mouse mice rat ant bee bug insect egg eye leg wing tail book
    page chapter story stories novel word letter sentence paper sheet notebook magazine newspaper pencil pen crayon
    marker eraser sticker stamp card postcard photo picture painting poster note message email text call apple
    orange banana pear peach peaches plum grape cherry cherries berry berries strawberry strawberries blueberry
    blueberries lemon lime mango mangoes melon watermelon pineapple coconut fruit vegetable carrot potato potatoes
    tomato tomatoes onion pepper cucumber mushroom pumpkin bean pea corn nut peanut cookie cake cupcake brownie
    donut doughnut muffin pie pizza pancake bread loaf loaves roll sandwich sandwiches burger hamburger cracker chip
    candy candies chocolate lollipop gumball marshmallow snack meal dinner breakfast lunch lunches dessert salad
    soup steak fry fries cheese milk coffee tea soda juice water sugar flour rice butter slice piece bar box boxes
    bag bottle can jar pack package packet case crate carton container basket bucket bowl glass glasses plate spoon
    fork knife knives pot pan cup tray tin barrel bundle batch batches bunch bunches pair set shirt pants dress
    dresses shoe sock hat coat jacket sweater skirt scarf scarves uniform button bead necklace bracelet earring ring
    jewel gem diamond stone rock pebble brick block tile plank log stick board nail wheel tire rope ribbon toy doll
    ball balloon marble game puzzle lego token ticket coin bill prize gift present medal trophy trophies car truck
    bus buses bike bicycle train plane boat ship vehicle trip ride flight house home room floor wall window door
    chair table desk bed lamp shelf shelves seat row column apartment building stair step street road bridge city
    cities town country countries state school store shop garden farm tree plant flower rose tulip daisy daisies
    seed leaf leaves branch branches bush bushes petal bouquet point goal vote mark question problem answer
    solution line segment side edge vertex vertices angle face corner triangle circle digit number integer value way
    time item thing object part section lap round turn song album movie film video episode show lesson session
    course subject test quiz quizzes exam grade job task chore project order sale machine computer phone program key
    battery batteries combination arrangement permutation pattern path possibility possibilities outcome element
    subset roots factors divisor multiples zeros zeroes term coefficient asymptote prime handshake match matches inning
    singer dancer doctor nurse soldier king queen hour push-up pushup jump hit win loss shot scoop serving recipe
    ingredient gumdrop jellybean sprinkle crystal cubes sphere cone cylinder tank pool passer sibling brother sister
    son daughter cousin uncle aunt grandchildren twin male female hoop locker camper tent sleeping firework candle
    lantern star planet cloud drop snowball snowman pill shell seashell spot pet follower cap feather guppy guppies
    push stitch surfer goldfish toddler decoration pup mask participant troll seagull vampire cob band duckling twig
    sweet fly flies pastry pastries tooth teeth firecracker sequin pigeon clove mink widget minnow basketball
    pointer oyster tool alligator zombie hike visit crab lizard squirrel dinosaur kangaroo spider butterfly
    butterflies caterpillar whale shark dolphin penguin lamb calf calves deer ox oxen dime load loads worth cost
    left each total remaining altogether apiece extra squares
"""
_BESIDE = """
    a an the of per every in on at off more old long tall high wide deep away all apart square sq cubic cu older
    younger taller longer shorter heavier faster ago later earlier
"""
_SHORT = """
    am pm yes no or and is are not so if it he she we be by to up mod one two six ten odd red sun
    mon tue wed thu fri sat
"""
_ALTERING = (
    r"hundreds?|thousands?|.*illions?|lakhs?|crores?|dozens?|gross|hal(?:f|ves)|quarter|.*(?:ir|f|x|n|h|en)ths|thirds"
    r"|twice|thrice|doubled?|tripled?|quadrupled?|.*fold|squared|cubed|factorial|opposite|reciprocal|inverse"
    r"|plus|minus|negative|not?|never|nor|neither|without|except|unless|if|false|wrong|incorrect|untrue"
    r"|than|less|greater|below|above|under|over|beyond"
)
_CHANGING = re.compile(
    rf"{_ALTERING}|quarters|.*(?:th|ird|ond)s?|scores?|roots?|factor|multiple|cube|choose"
    r"|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|.*teen|twenty|.*rty|.*fty|.*nty|eighty"
    r"|or|to|times|out|by|mod|modulo|base|between|fewer|least|most"
)
_NO_PREFACE = re.compile(rf"{_ALTERING}|at")  # at least
_UNITS = frozenset((_MEASURES + _COUNTED).split())
BESIDE = frozenset(_BESIDE.split())  # what may stand between units, or after them
HEDGES = frozenset({"about", "around", "approximately", "approx", "roughly"})
WORDS = _UNITS | BESIDE | HEDGES | frozenset(_SHORT.split())
LETTERS = frozenset("mgshlL")  # units where they are apart from the number: 5m and 3xy are algebra
UPRIGHT = LETTERS | frozenset("CFJKNVW")  # and where they are upright
_ASKED = re.compile(r"how (?:many|much) ((?:[a-z]+ ){0,2}[a-z]+)", re.IGNORECASE)


def is_unit(word: str, asked: frozenset[str] = frozenset()) -> bool:
    """Whether a word counts or measures, in singular or plural; `asked` has further ones."""
    known = _UNITS | asked if asked else _UNITS
    return word in known or (word[-1:] == "s" and (word[:-1] in known or (word[-2:] == "es" and word[:-2] in known)))


def singular(word: str) -> str:
    """One of what a unit counts: `box` of `boxes`. Words that are no known plural stay."""
    for end in ("s", "es"):
        if word.endswith(end) and word.removesuffix(end) in _UNITS:
            return word.removesuffix(end)
    return word


def describes(word: str) -> bool:
    """Whether a word may stand before a unit without changing the number: `3 red apples`."""
    return _CHANGING.fullmatch(word) is None


def introduces(word: str) -> bool:
    """Whether a word may stand before a number without changing it: `Total: 3`, not `twice: 3` or `not x = 3`."""
    return _NO_PREFACE.fullmatch(word) is None


def asked_units(question: str) -> frozenset[str]:
    """What a question wants counted: `wugs` of "How many wugs are there?"."""
    words = (word for match in _ASKED.finditer(question) for word in match[1].lower().split())
    return frozenset(word for word in words if describes(word) and word not in BESIDE)
