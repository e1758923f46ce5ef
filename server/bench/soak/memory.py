"""What a process holds, told apart from what it borrows.

Resident memory is what the process has written itself, plus pages of files (mostly libraries) that it happens to
have in view. Private memory counts those files' pages too, as long as no other process has them in view: it jumps
by tens of megabytes when another process of the same libraries comes or goes, and nothing has changed in this one.
So what must not grow is the first part alone: pages that no file backs, which are heaps, stacks and what was
written over a file's pages.
"""

import re
from pathlib import Path

import psutil


def own_bytes(process: psutil.Process) -> int:
    """Bytes that the process has written and still holds, swapped out or not.

    Only Linux tells; elsewhere it is private memory.
    """
    try:
        text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except FileNotFoundError:
        return int(process.memory_full_info().uss)
    kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE))
    return 1024 * (int(kilobytes["Anonymous"]) + int(kilobytes["Swap"]))
