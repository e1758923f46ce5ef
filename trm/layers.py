"""The shared block: norm, rotary positions, attention, feed-forward.

Legend: N positions in any leading shape, B rows, Q query positions, S key positions, D hidden, H heads,
K key/value heads, d head size.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RMS_EPS = 1e-6
FOLD_QUERIES = 8  # measured on a CPU: from 16 queries on, folding is slower than SDPA's own grouping

KeyValue = tuple[Tensor, Tensor]  # keys and values, each (B, K, S, d); keys already rotated
Rope = tuple[Tensor, Tensor]  # cosine and signed sine of the positions, each (N, d)


class KeyValues(Protocol):
    """Keys and values of the positions that a call may look at, in numbered entries; who sees which is its business."""

    def write(self, entry: int, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values (N, K, d) of the call's positions."""

    def attend(self, entry: int, queries: Tensor) -> Tensor:
        """What the call's positions, queries (N, H, d), read from an entry: (N, H, d)."""


def rms(h: Tensor) -> Tensor:
    """Scale each vector to root mean square 1; parameter-free, computed in float32 or wider."""
    wide = h if h.dtype == torch.float64 else h.float()
    return F.rms_norm(wide, wide.shape[-1:], eps=RMS_EPS).to(h.dtype)


def signed(cos: Tensor, sin: Tensor) -> Rope:
    """The rope that `rotate` takes, from plain cosine and sine (N, d): the first half of the sine negated."""
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)


def rotate(heads: Tensor, rope: Rope) -> Tensor:
    """Apply rotary positions to (N, heads, d), in the half-split convention of Qwen and Llama."""
    cos, sin = (part.unsqueeze(-2) for part in rope)
    return (heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin).to(heads.dtype)


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
    read once, not once per head. On a GPU all are: no fast kernel takes grouped heads and a mask.
    Under autocast on a CPU it runs in float32: bfloat16 takes four times as long there.
    """
    if queries.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attend(queries.float(), keys.float(), values.float(), mask)
    num_queries, groups = queries.shape[2], queries.shape[1] // keys.shape[1]
    if num_queries > FOLD_QUERIES and queries.device.type == "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
    folded = queries.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, K, groups * Q, d)
    if num_queries > 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    return out.unflatten(2, (groups, -1)).flatten(1, 2)  # type: ignore[no-any-return]


class Linear(nn.Linear):
    """A linear layer in its weight's type, whatever comes in."""

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h.to(self.weight.dtype), self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention whose keys and values come from wherever the caller projects them."""

    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=False)

    def keys_values(self, source: Tensor, rope: Rope) -> KeyValue:
        """Project `source` (N, D) to rotated keys and values, each (N, K, d)."""
        return rotate(self._heads(self.k_proj(source)), rope), self._heads(self.v_proj(source))

    def forward(self, h: Tensor, rope: Rope, entry: int, key_values: KeyValues) -> Tensor:
        """Attend from h (N, D) to what lies in `entry`; returns (N, D)."""
        queries = rotate(self._heads(self.q_proj(h)), rope)
        return self.o_proj(key_values.attend(entry, queries).flatten(-2))  # type: ignore[no-any-return]

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

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

    def forward(self, h: Tensor, rope: Rope, entry: int, key_values: KeyValues) -> Tensor:
        h = rms(h + self.attention(h, rope, entry, key_values))
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
