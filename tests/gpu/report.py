"""The one JSON file of `tests.gpu.run`, written anew after each number: whoever is killed leaves what it has."""

import json
import os
from pathlib import Path
from typing import Any


class Report:
    """Sections of names and numbers in a file. One process writes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Everything so far."""
        found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return found

    def put(self, section: str, name: str, value: Any) -> None:
        """Note a value under a name of a section."""
        found = self.read()
        found.setdefault(section, {})[name] = value
        self.write(found)

    def write(self, found: dict[str, Any]) -> None:
        """Replace the file, whole or not at all."""
        aside = self.path.with_name(self.path.name + ".new")
        aside.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(aside, self.path)
