"""Directories that a command writes to."""

from pathlib import Path

from trm.errors import ConfigError


def require_writable(directory: Path, flag: str = "--output-dir") -> None:
    """Make the directory that `flag` names. Raises ConfigError where no file can be made in it."""
    probe = directory / ".writable"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{flag} {directory}: cannot write there: {error.strerror}") from error
