"""Qwen-TRM: a frozen language model with a Tiny Recursive Model decoder.

Importing this package is cheap: torch and transformers are imported when something here first needs them. Once this
package and transformers' Auto classes are both imported, in either order, they know the model.
"""

import sys
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wrapt

from trm.chat import SYSTEM_PROMPT

if TYPE_CHECKING:
    from trm.config import TRMConfig
    from trm.model import TRMForCausalLM

__version__ = metadata.version("qwen-trm")
__all__ = ["SYSTEM_PROMPT", "TRMConfig", "TRMForCausalLM", "bundled_model_path"]

_LAZY = {"TRMConfig": "trm.config", "TRMForCausalLM": "trm.model"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import(name: str, _auto_module: object) -> None:
    """Import a module of ours, unless some thread is at it: waiting for it here could wait for each other."""
    if name not in sys.modules:
        import_module(name)


def bundled_model_path() -> Path:
    """The directory of the small model that ships with this package."""
    return Path(__file__).parent / "bundled"


# Importing these modules registers what they define. Each waits for the Auto class that it registers with.
for _auto_class, _ours in (("configuration_auto", "trm.config"), ("modeling_auto", "trm.model")):
    wrapt.register_post_import_hook(partial(_import, _ours), f"transformers.models.auto.{_auto_class}")
