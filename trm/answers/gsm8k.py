"""GSM8K's way of writing answers down, and ours for it."""

import re

from trm.answers.boxes import boxed

_ANNOTATION = re.compile(r"<<([^<>]*)>>")  # GSM8K's calculator


def gsm8k_equations(answer: str) -> tuple[str, ...]:
    """What a GSM8K answer's calculator annotations work out, in order: `48/2=24` of `<<48/2=24>>`."""
    found = [text.strip() for text in _ANNOTATION.findall(answer)]
    return tuple(text for text in found if "=" in text and not text.endswith("="))


def convert_gsm8k(answer: str, keep_annotations: bool = False) -> str:
    r"""A GSM8K answer with its last line `#### 72` replaced by `\boxed{72}`.

    The final answer is copied as written. Calculator annotations (`<<48/2=24>>`) are removed unless kept.
    Raises ValueError if the last line holds no `####` or nothing after it.
    """
    if not keep_annotations:
        answer = _ANNOTATION.sub("", answer)
    body, mark, final = answer.rpartition("####")
    final = final.strip()
    if not mark:
        raise ValueError(f"GSM8K answer has no '####' before its final answer: …{answer[-80:]!r}")
    if not final or "\n" in final:
        raise ValueError(f"GSM8K answer needs one line after '####', got {final[:80]!r}")
    return body + boxed(final)
