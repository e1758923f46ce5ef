"""Where float32 may decide otherwise in a batch than alone."""

from functools import cache

from trm import TRMForCausalLM, bundled_model_path, checkpoint, reference
from trm.chat import ChatFormat, solve_messages
from trm.engine import SamplingParams

NEAR_TIE = 1e-3  # between the two best scores of a token


@cache
def bundled() -> tuple[TRMForCausalLM, ChatFormat]:
    """The bundled model in this process."""
    path = bundled_model_path()
    return TRMForCausalLM.from_pretrained(path), ChatFormat(checkpoint.read_tokenizer(path))


def assert_near_tie(question: str, params: SamplingParams, one: str, other: str) -> None:
    """The two texts part at a token whose two best scores, decoded alone, are nearly equal."""
    model, chat = bundled()
    reply = reference.decode(model, chat.encode(solve_messages(question)), params, chat.end_id)
    assert chat.decode(reply.token_ids) in (one, other)
    prefixes = [chat.decode(reply.token_ids[:n]) for n in range(len(reply.token_ids) + 1)]
    first = next(n for n, prefix in enumerate(prefixes) if not (one.startswith(prefix) and other.startswith(prefix)))
    assert reply.gaps[first - 1] < NEAR_TIE
