"""What a process holds, told apart from what it borrows, as the system sees it.

Resident memory is what the process has written itself, plus pages of files (mostly libraries) that it happens to
have in view. Private memory counts those files' pages too, as long as no other process has them in view: it jumps
by tens of megabytes when another process of the same libraries comes or goes, and nothing has changed in this one.
The first part alone is the process's own: heaps, stacks and what was written over a file's pages. It is the most that
was ever needed at once, so a leak that fills the free pieces of a heap does not show here, but in `server.memory`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Memory:
    """Bytes: written by the process itself, resident, private."""

    own: int
    resident: int
    private: int


def weigh(process: psutil.Process) -> Memory:
    """Swapped pages count as the process's own. Only Linux tells these apart; elsewhere private memory does."""
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except FileNotFoundError:
        found = process.memory_full_info()
        return Memory(found.uss, found.rss, found.uss)
    part = {name: 1024 * int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
    return Memory(part["Anonymous"] + part["Swap"], part["Rss"], part["Private_Clean"] + part["Private_Dirty"])
