"""How far a reply that halts early agrees with one that does not, tolerance by tolerance.

Teacher-forced on replies of full depth: at every position of a reply, would the token chosen at
the step where its probabilities have stopped moving be the token chosen at the last step?
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trm.cache import Sequences
from trm.layers import causal_mask
from trm.model import TRMForCausalLM

TOLERANCES = tuple(round(10 ** (exponent / 10), 5) for exponent in range(-40, 1))  # 0.0001 to 1


@dataclass(frozen=True)
class Agreement:
    """Over all positions: how many chose the full-depth token, and how many steps they took together."""

    tolerance: float
    positions: int
    agreeing: int
    steps: int


@torch.inference_mode()
def agreements(
    model: TRMForCausalLM, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], effort: int
) -> list[Agreement]:
    """For each tolerance, ascending, over the replies of `sequences` (prompt, reply). Keys from the context only."""
    moved, right = [], []
    for prompt, reply in sequences:
        ids = torch.tensor([[*prompt, *reply[:-1]]], device=model.device)
        length, first = ids.shape[1], len(prompt) - 1
        mask = causal_mask(torch.ones_like(ids), length)
        cos, sin = model.backbone.rope(torch.arange(length, device=ids.device)[None])
        states = model.encode(model.backbone.embed_tokens(ids), (cos, sin), Sequences(mask))
        context = Sequences(mask, keep=True)
        model.decoder.write_context(states, (cos, sin), context)
        x, rope, context = states[:, first:, -1], (cos[:, first:], sin[:, first:]), context.seen_by(mask[:, :, first:])
        y = z = torch.zeros_like(x)
        answer, tokens, distances = x, [], []
        for _ in range(effort):
            y, z = model.decoder.step(x, y, z, rope, context)
            distances.append(model.moved(answer, y)[0])
            tokens.append(model.readout(y).argmax(-1)[0])
            answer = y
        moved.append(torch.stack(distances))
        right.append(torch.stack(tokens) == tokens[-1])
    all_moved, all_right = torch.cat(moved, 1), torch.cat(right, 1)  # (effort, positions)
    rows = []
    for tolerance in TOLERANCES:
        halted = all_moved < tolerance
        halted[-1] = True
        at = halted.int().argmax(0)
        agreeing = int(all_right.gather(0, at[None]).sum())
        rows.append(Agreement(tolerance, len(at), agreeing, int((at + 1).sum())))
    return rows


def loosest(rows: Sequence[Agreement], least_agreement: float) -> Agreement:
    """The row of the largest tolerance that, like every tighter one, agrees often enough; else the tightest."""
    chosen = rows[0]
    for row in rows:
        if row.agreeing < least_agreement * row.positions:
            break
        chosen = row
    return chosen
