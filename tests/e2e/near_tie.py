"""Where float32 may decide otherwise in a batch than alone."""

from functools import cache

from server.bench.soak.canaries import Canary, part_at_near_tie
from trm import TRMForCausalLM, bundled_model_path, checkpoint
from trm.chat import ChatFormat
from trm.engine import SamplingParams


@cache
def bundled() -> tuple[TRMForCausalLM, ChatFormat]:
    """The bundled model in this process."""
    path = bundled_model_path()
    return TRMForCausalLM.from_pretrained(path), ChatFormat(checkpoint.read_tokenizer(path))


def assert_near_tie(question: str, params: SamplingParams, one: str, other: str) -> None:
    """The two texts part at a token whose two best scores, decoded alone, are nearly equal."""
    assert part_at_near_tie(*bundled(), Canary(question, params), one, other)
