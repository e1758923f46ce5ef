"""Memory of one's own is what one has written, whatever files are in view."""

import mmap
import os

import psutil

from server.bench.soak.memory import weigh

SIZE = 64 * 2**20
SLACK = SIZE // 4  # whatever else this process does meanwhile


def test_pages_of_a_file_are_borrowed_and_written_pages_are_ones_own(tmp_path):
    path = tmp_path / "library"
    path.write_bytes(bytes(SIZE))
    process = psutil.Process()
    file = os.open(path, os.O_RDONLY)
    before = weigh(process)

    with mmap.mmap(file, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as pages:
        os.close(file)
        assert sum(pages[:: mmap.PAGESIZE]) == 0  # each page is read once
        read = weigh(process)
        assert abs(read.resident - before.resident - SIZE) < SLACK
        assert abs(read.private - before.private - SIZE) < SLACK, "nobody else has it in view"
        assert abs(read.own - before.own) < SLACK

        for page in range(0, SIZE, mmap.PAGESIZE):
            pages[page] = 1
        assert abs(weigh(process).own - before.own - SIZE) < SLACK
    assert abs(weigh(process).own - before.own) < SLACK
