"""The pages that we write by hand, and the code in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOGS = {ROOT / "docs" / "log.md"}  # what was done, in the words of the day
PAGES = sorted({path for folder in (".", "docs", "deploy", ".github") for path in (ROOT / folder).glob("*.md")} - LOGS)


def blocks(page: Path, language: str = r"\w*") -> list[str]:
    """Fenced code blocks of a language, or of any."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """Code inside of sentences and tables."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(page: Path) -> list[str]:
    """Lines of code, continued lines joined, comments taken off; and code inside of sentences."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [re.sub(r"(^|\s)#.*", "", line) for line in lines] + spans(page)
