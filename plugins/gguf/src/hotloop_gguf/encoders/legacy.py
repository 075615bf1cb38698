"""Blocks of 32 values with one float16 scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

As in `k_quants`, a function takes x [rows, K] in float32 and gives the blocks' bytes. Layouts: ggml's
`ggml-common.h`. Without importance there is no search: the scale follows from a block's extremes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .parts import constant, half, inverse, pack, weighted
from .searches import Grid

if TYPE_CHECKING:
    from torch import Tensor

    from .searches import Searches


def q8_0(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d, 32 int8 q; x = d q, d = max|x| / 127. Importance changes nothing."""
    groups = x.reshape(-1, 32)
    d = searches.extreme(groups).abs() / constant(127, x)
    q = searches.round_away(groups, inverse(d))
    return torch.cat([half(d[:, None]), q.view(torch.uint8)], 1)


def q4_0(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d, 16 bytes of two q; x = d (q - 8)."""
    d, q = _symmetric(x, importance, searches, 8)
    return torch.cat([half(d), pack(q, 2, 16)], 1)


def q5_0(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d, 4 bytes of fifth bits, 16 bytes of two low nibbles; x = d (q - 16)."""
    d, q = _symmetric(x, importance, searches, 16)
    return torch.cat([half(d), _fifth_bits(q), pack(q, 2, 16)], 1)


def q4_1(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d and m, 16 bytes of two q; x = d q + m."""
    d, m, q = _affine(x, importance, searches, 15)
    return torch.cat([half(d), half(m), pack(q, 2, 16)], 1)


def q5_1(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d and m, 4 bytes of fifth bits, 16 bytes of two low nibbles; x = d q + m."""
    d, m, q = _affine(x, importance, searches, 31)
    return torch.cat([half(d), half(m), _fifth_bits(q), pack(q, 2, 16)], 1)


def _symmetric(
    x: Tensor, importance: Tensor | None, searches: Searches, limit: int
) -> tuple[Tensor, Tensor]:
    """d [blocks, 1] and q [blocks, 32]; without importance the value farthest from 0 has q = 0."""
    groups = x.reshape(-1, 32)
    if importance is not None:
        weight = weighted(x, importance, searches, x.shape[1], 1.0).reshape(groups.shape)
        d, q = searches.symmetric(groups, weight, limit)
        return d[:, None], q
    d = searches.extreme(groups) / -limit
    none = torch.zeros_like(d)
    q = searches.truncate(groups, none, inverse(d), limit + 0.5, 2 * limit - 1)
    return d[:, None], q


def _affine(
    x: Tensor, importance: Tensor | None, searches: Searches, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """d and m [blocks, 1] and q [blocks, 32]; without importance from minimum to maximum."""
    groups = x.reshape(-1, 32)
    if importance is not None:
        weight = weighted(x, importance, searches, x.shape[1], 1.0).reshape(groups.shape)
        d, low, q = searches.affine(groups, weight, Grid(levels, -0.9, 0.05, 37))
        return d[:, None], -low[:, None], q
    low, high = searches.bounds(groups)
    d = (high - low) / constant(levels, x)
    q = searches.truncate(groups, low, inverse(d), 0.5, levels)
    return d[:, None], low[:, None], q


def _fifth_bits(q: Tensor) -> Tensor:
    """Bit 4 of value j as bit j % 8 of byte j // 8.

    Eight bytes of 0 or 1 are one integer; multiplying moves byte i's bit to place 56 + i.
    """
    return ((q >> 4).view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)
