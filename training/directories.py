"""Places that a command writes to: that it can, that nobody else does, and what it says when the disk is full."""

import errno
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from trm.errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


def require_writable(directory: Path, flag: str = "--output-dir") -> None:
    """Make the directory that `flag` names. Raises ConfigError where no file can be made in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=directory).close()  # a name of its own: another command may be trying, too
    except OSError as error:
        raise ConfigError(f"{flag} {directory}: cannot write there: {error.strerror}") from error


def lock(file: IO[Any], place: str, command: str) -> None:
    """Keep other processes out of a place as long as `file` is open; it ends with the process, however that ends.

    Raises ConfigError where another `command` is there.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{place}: another {command} is at work there; wait for it, or choose another place"
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s); do not start a second %s there", place, error.strerror, command)


@contextmanager
def claim(directory: Path, command: str, flag: str = "--output-dir") -> Iterator[None]:
    """Make the directory that `flag` names, and keep other processes out of it until the block or the process ends.

    Raises ConfigError where another `command` is there, or nothing can be written.
    """
    require_writable(directory, flag)
    with (directory / ".lock").open("w") as file:
        lock(file, f"{flag} {directory}", command)
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writing to a file that the same command goes on with. Raises CheckpointError where that is impossible."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror}; once it can, the same command goes on from there"
        ) from error


class JsonLines:
    """A file of objects, one a line, that grows at its end; what is written is on its way to the disk at once."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        with writing(path):
            self.file: IO[str] = path.open(mode, encoding="utf-8")

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines. Raises CheckpointError, as opening it does."""
        with writing(self.path):
            self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            self.file.flush()

    def close(self) -> None:
        """What could not be written has been complained of."""
        with suppress(OSError):
            self.file.close()
