r"""Find, read and compare final answers: the only definition of all three.

From the `\boxed{}` convention and the GSM8K conversion that teaches it to the comparison that grades it. Knows no
model, prompt or server, and needs only the standard library; computer algebra is for evaluation alone
(`training.evaluation.algebra`). In the order of reading:

    boxes, gsm8k     where an answer stands in a reply, and how a training row says it
    spelling         dress that changes no meaning
    tokens           answer text to tokens
    words            units and counted nouns, and words that no unit is
    cursor, units    where a reader stands, and how it steps over what is counted
    tree, grammar    tokens to a tree of numbers, names and structures
    lists            what the members of a list are to each other
    rules            a tree to its normal form: arithmetic, signs, sets, chains of equalities
    comparison       what counts as the same answer

Never guesses: a reply without a complete box has no answer, and what cannot be read as mathematics stays text.
Numbers are exact; no float is ever made, and decimals of 40 digits may only reject. Finding boxes takes linear time;
an answer beyond `spelling.MAX_CHARS` is compared as text, which bounds the time for any other. No text makes anything
raise, except `convert_gsm8k` a row without a final answer (ValueError); `is_correct` refuses a gold of another type
(TypeError).
"""

from trm.answers.boxes import Boxed, boxed, extract_boxed, find_boxed
from trm.answers.comparison import canonical, is_correct, key, normalize, same
from trm.answers.gsm8k import convert_gsm8k, gsm8k_equations

__all__ = [
    "Boxed",
    "boxed",
    "canonical",
    "convert_gsm8k",
    "extract_boxed",
    "find_boxed",
    "gsm8k_equations",
    "is_correct",
    "key",
    "normalize",
    "same",
]
