"""How much of the memory that the process holds is in use; the rest is broken up, or was needed for a moment.

What the system sees of a process is the most that it ever needed at once. Whether something adds up shows here first:
a leak fills the free pieces for a long time before the process grows.
"""

import ctypes
import sys
from functools import cache

FIELDS = "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def python_blocks() -> int:
    """Pieces of at most 512 bytes that objects hold in Python's own heap."""
    return sys.getallocatedblocks()


def malloc_in_use_bytes() -> int | None:
    """Bytes that malloc has handed out, in all its heaps and beside them; None where the C library does not tell.

    Python's own heap, which takes its memory elsewhere, is not in it.
    """
    mallinfo = _mallinfo()
    if mallinfo is None:
        return None
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


@cache
def _mallinfo() -> "ctypes._NamedFuncPointer | None":
    try:
        mallinfo = ctypes.CDLL("libc.so.6").mallinfo2  # glibc 2.33
    except (OSError, AttributeError):
        return None
    mallinfo.restype = _Mallinfo
    return mallinfo
