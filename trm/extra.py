"""The libraries of the extras: a server does without them, and so does every command until it needs one.

Who uses one asks here before the work begins, and imports it inside the function or module that needs it.
"""

from importlib.util import find_spec

from trm.errors import ConfigError


def require(library: str, purpose: str, remedy: str = "in a clone, run make install") -> None:
    """Raise ConfigError, with what to install, unless the library is there."""
    if find_spec(library) is None:
        raise ConfigError(f"{purpose} needs {library}, which is not installed; {remedy}")
