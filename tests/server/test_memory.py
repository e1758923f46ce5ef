"""What is in use of the process's memory, as malloc and Python tell."""

import ctypes
import platform

import pytest

from server.memory import malloc_in_use_bytes, python_blocks

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library does not tell")


@glibc
@pytest.mark.parametrize("size", [1_000, 100_000_000], ids=["in a heap", "beside the heaps"])
def test_what_malloc_hands_out_is_in_use_until_it_is_given_back(size):
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    count = 100_000_000 // size
    before = malloc_in_use_bytes()

    pieces = [libc.malloc(ctypes.c_size_t(size)) for _ in range(count)]
    during = malloc_in_use_bytes()
    for piece in pieces:
        libc.free(piece)

    assert during - before == pytest.approx(100_000_000, rel=0.05)
    assert malloc_in_use_bytes() - before < 5_000_000


def test_objects_hold_blocks_of_python_until_they_are_gone():
    before = python_blocks()
    objects = [object() for _ in range(100_000)]
    during = python_blocks()
    del objects

    assert during - before == pytest.approx(100_000, rel=0.05)
    assert python_blocks() - before < 5_000
