"""The shared block: norm, rotary positions, attention, feed-forward.

Legend: B rows, Q query positions, S key positions, D hidden, H heads, K key/value heads, d head size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RMS_EPS = 1e-6
FOLD_QUERIES = 8  # measured on a CPU: from 16 queries on, folding is slower than SDPA's own grouping

KeyValue = tuple[Tensor, Tensor]  # keys and values, each (B, K, S, d); keys already rotated
Rope = tuple[Tensor, Tensor]  # cosine and signed sine of the positions, each (B, Q, d)


def rms(h: Tensor) -> Tensor:
    """Scale each vector to root mean square 1; parameter-free, computed in float32 or wider."""
    wide = h if h.dtype == torch.float64 else h.float()
    return F.rms_norm(wide, wide.shape[-1:], eps=RMS_EPS).to(h.dtype)


def signed(cos: Tensor, sin: Tensor) -> Rope:
    """The rope that `rotate` takes, from plain cosine and sine (B, Q, d): the first half of the sine negated."""
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)


def rotate(heads: Tensor, rope: Rope) -> Tensor:
    """Apply rotary positions to (B, heads, Q, d), in the half-split convention of Qwen2 and Llama."""
    cos, sin = (part.unsqueeze(1).to(heads.dtype) for part in rope)
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin


def causal_mask(key_mask: Tensor, num_queries: int) -> Tensor:
    """What each of the last `num_queries` positions may attend to: (B, S) real-token mask -> (B, 1, Q, S) bool.

    A padding position attends to itself, so that no row of the softmax is empty.
    """
    total = key_mask.shape[1]
    keys = torch.arange(total, device=key_mask.device)
    queries = keys[total - num_queries :, None]
    allowed = (keys <= queries) & key_mask[:, None, None, :].bool()
    return allowed | (keys == queries)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention: queries (B, H, Q, d) over keys and values (B, K, S, d).

    `mask` (B, 1, Q, S) is boolean, or additive in the queries' type. Returns (B, H, Q, d).
    Few queries are folded: the heads that share keys become queries of one head, so each key is
    read once, not once per head. Under autocast on a CPU it runs in float32: bfloat16 takes four
    times as long there.
    """
    if queries.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attend(queries.float(), keys.float(), values.float(), mask)
    num_queries, groups = queries.shape[2], queries.shape[1] // keys.shape[1]
    if num_queries > FOLD_QUERIES:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
    folded = queries.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, K, groups * Q, d)
    if num_queries > 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    return out.unflatten(2, (groups, -1)).flatten(1, 2)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Attending:
    """What the recursion's queries may look at, for one supervision step.

    `rope` the queries' positions; `mask` (B, 1, Q, S) as `attend` takes it. With keys from the context,
    `context` holds one (keys, values) per layer; with keys from the state, `update(entry, keys,
    values)` stores the new ones of a call and returns all of them, `entry` counting from 0 in
    every step.
    """

    rope: Rope
    mask: Tensor
    context: Sequence[KeyValue] | None = None
    update: Callable[[int, Tensor, Tensor], KeyValue] | None = None


class Attention(nn.Module):
    """Grouped-query attention whose keys and values come from wherever the caller projects them."""

    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def keys_values(self, source: Tensor, rope: Rope) -> KeyValue:
        """Project `source` (B, S, D) to rotated keys and values, each (B, K, S, d)."""
        return rotate(self._heads(self.k_proj(source)), rope), self._heads(self.v_proj(source))

    def forward(self, h: Tensor, keys: Tensor, values: Tensor, attending: Attending) -> Tensor:
        """Attend from h (B, Q, D); returns (B, Q, D)."""
        queries = rotate(self._heads(self.q_proj(h)), attending.rope)
        out = attend(queries, keys, values, attending.mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One post-norm layer of the shared block f."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int, intermediate_size: int
    ) -> None:
        super().__init__()
        self.attention = Attention(hidden_size, num_heads, num_key_value_heads, head_dim)
        self.feed_forward = SwiGLU(hidden_size, intermediate_size)

    def forward(self, h: Tensor, keys: Tensor, values: Tensor, attending: Attending) -> Tensor:
        h = rms(h + self.attention(h, keys, values, attending))
        return rms(h + self.feed_forward(h))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Truncated LeCun normal, and zero output projections: the layer starts as rms(h)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features) / 0.87962566  # the cut at two deviations shrinks the spread
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        self.attention.o_proj.weight.zero_()
        self.feed_forward.down_proj.weight.zero_()
