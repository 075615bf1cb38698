"""Blocks of 32 values with one float16 scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

As in `k_quants`, a function takes x [rows, K] in float32 and gives the blocks' bytes. Layouts: ggml's
`ggml-common.h`. Without importance there is no search: the scale follows from a block's extremes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .parts import constant, even_block, half, inverse, weighted
from .searches import Grid

if TYPE_CHECKING:
    from torch import Tensor

    from .searches import Searches


def q8_0(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d, 32 int8 q; x = d q, d = max|x| / 127. Importance changes nothing."""
    groups = x.reshape(-1, 32)
    d = searches.largest(groups) / constant(127, x)
    q = searches.round_away(groups, inverse(d))
    return torch.cat([half(d[:, None]), q.view(torch.uint8)], 1)


def q4_0(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d, 16 bytes of two q; x = d (q - 8)."""
    return _symmetric(x, importance, searches, 15)


def q5_0(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d, 4 bytes of fifth bits, 16 bytes of two low nibbles; x = d (q - 16)."""
    return _symmetric(x, importance, searches, 31)


def q4_1(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d and m, 16 bytes of two q; x = d q + m."""
    return _affine(x, importance, searches, 15)


def q5_1(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d and m, 4 bytes of fifth bits, 16 bytes of two low nibbles; x = d q + m."""
    return _affine(x, importance, searches, 31)


def _symmetric(x: Tensor, importance: Tensor | None, searches: Searches, levels: int) -> Tensor:
    groups = x.reshape(-1, 32)
    if importance is None:
        return searches.even(groups, levels, offset=False)
    weight = weighted(x, importance, searches, x.shape[1], 1.0).reshape(groups.shape)
    d, q = searches.symmetric(groups, weight, (levels + 1) // 2)
    return even_block(d[:, None], None, q, levels)


def _affine(x: Tensor, importance: Tensor | None, searches: Searches, levels: int) -> Tensor:
    groups = x.reshape(-1, 32)
    if importance is None:
        return searches.even(groups, levels, offset=True)
    weight = weighted(x, importance, searches, x.shape[1], 1.0).reshape(groups.shape)
    d, low, q = searches.affine(groups, weight, Grid(levels, -0.9, 0.05, 37))
    return even_block(d[:, None], -low[:, None], q, levels)
