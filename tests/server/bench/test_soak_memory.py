"""Memory of one's own is what one has written, whatever files are in view."""

import mmap
import os

import psutil

from server.bench.soak.memory import own_bytes

SIZE = 64 * 2**20
SLACK = SIZE // 4  # whatever else this process does meanwhile


def test_pages_of_a_file_are_borrowed_and_written_pages_are_ones_own(tmp_path):
    path = tmp_path / "library"
    path.write_bytes(bytes(SIZE))
    process = psutil.Process()
    file = os.open(path, os.O_RDONLY)
    empty, private = own_bytes(process), process.memory_full_info().uss

    with mmap.mmap(file, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as pages:
        os.close(file)
        assert sum(pages[:: mmap.PAGESIZE]) == 0  # each page is read once
        assert process.memory_full_info().uss - private > SIZE - SLACK, "nobody else has it in view"
        assert abs(own_bytes(process) - empty) < SLACK

        for page in range(0, SIZE, mmap.PAGESIZE):
            pages[page] = 1
        assert abs(own_bytes(process) - empty - SIZE) < SLACK
    assert abs(own_bytes(process) - empty) < SLACK
