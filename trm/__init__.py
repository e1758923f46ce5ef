"""Qwen-TRM: a frozen language model with a Tiny Recursive Model decoder.

Importing this package registers the model with transformers' Auto classes.
"""

from importlib.metadata import version
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from trm.chat import SYSTEM_PROMPT
from trm.config import TRMConfig
from trm.model import TRMForCausalLM

__version__ = version("qwen-trm")
__all__ = ["SYSTEM_PROMPT", "TRMConfig", "TRMForCausalLM", "bundled_model_path"]

AutoConfig.register("trm", TRMConfig)
AutoModelForCausalLM.register(TRMConfig, TRMForCausalLM)


def bundled_model_path() -> Path:
    """The directory of the small model that ships with this package."""
    return Path(__file__).parent / "bundled"
