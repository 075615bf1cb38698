"""Blocks of 256 values in groups with scales of their own: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

Every function takes x [rows, K] in float32 with K a multiple of 256, the importance of its K columns or
None, and the searches of x's device; it gives the blocks' bytes, [rows K / 256, bytes] in uint8. Layouts
and order of the steps: ggml's `ggml-common.h` and `ggml-quants.c`, whose bytes these are. First a scale
(and a minimum) is searched for each group, then those are quantised for the block, then each value is
rounded with what a reader will decode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .parts import constant, half, inverse, pack, weighted, widest
from .searches import TINY, Grid

if TYPE_CHECKING:
    from torch import Tensor

    from .searches import Searches


def q2_k(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """16 bytes of a scale and, above it, a minimum; 64 bytes of four q; float16 d, float16 dmin.

    16 groups of 16: x = d sc q - dmin m, q in 0..3, sc and m in 0..15.
    """
    grid = Grid(3, -0.5, 0.1, 16, absolute=True)
    d, sc, dmin, m, q = _affine(x, importance, searches, 16, 15, grid)
    return torch.cat([sc | m << 4, pack(q, 4, 32), half(d), half(dmin)], 1)


def q3_k(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """32 bytes of third bits, 64 bytes of four lower bit pairs, 12 bytes of 6-bit scales, float16 d.

    16 groups of 16: x = d (s - 32) (q - 4), q in 0..7.
    """
    groups = x.reshape(-1, 16)
    if importance is None:
        scale, q = searches.descent(groups, 4)
        d, s = _signed_unit(scale.reshape(-1, 16), 32)
        s = torch.where(d == 0, 0, s + 32).to(torch.uint8)  # a block of zeros is all zero bits
    else:
        weight = weighted(x, importance, searches, 256, 2.0).reshape(-1, 16)
        scale, q = searches.symmetric(groups, weight, 4)
        total = searches.sums(weight)
        d, s = searches.symmetric(scale.reshape(-1, 16), total.reshape(-1, 16), 32)
        d = d[:, None]
    searches.round_symmetric(groups, _decoded(d, s.float() - 32), 4, q)
    low = (s[:, :8] & 15) | (s[:, 8:] & 15) << 4
    high = (s >> 4).reshape(-1, 4, 4)
    high = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    q = q.reshape(-1, 256)
    parts = [pack(q, 8, 32, shift=2), pack(q, 4, 32), low, high, half(d)]
    return torch.cat(parts, 1)


def q4_k(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d, float16 dmin, 12 bytes of 6-bit scales and minimums, 128 bytes of two q.

    8 groups of 32: x = d sc q - dmin m, q in 0..15, sc and m in 0..63.
    """
    grid = Grid(15, -1.0, 0.1, 21)
    d, sc, dmin, m, q = _affine(x, importance, searches, 32, 63, grid)
    return torch.cat([half(d), half(dmin), _six_bits(sc, m), pack(q, 2, 32)], 1)


def q5_k(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """The same with q in 0..31: before the low nibbles 32 bytes of fifth bits."""
    grid = Grid(31, -0.5, 0.1, 16)
    d, sc, dmin, m, q = _affine(x, importance, searches, 32, 63, grid)
    fifth, rest = pack(q, 8, 32, shift=4), pack(q, 2, 32)
    return torch.cat([half(d), half(dmin), _six_bits(sc, m), fifth, rest], 1)


def q6_k(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 int8 scales, float16 d.

    16 groups of 16: x = d sc (q - 32), q in 0..63.
    """
    groups = x.reshape(-1, 16)
    weight = None
    if importance is not None:
        weight = importance.expand(x.shape).reshape(-1, 16)
    scale, q = searches.symmetric(groups, weight, 32)
    scale = scale.reshape(-1, 16)
    d, sc = _signed_unit(torch.where(widest(scale).abs() < TINY, 0.0, scale), 128)
    searches.round_symmetric(groups, _decoded(d, sc), 32, q)
    q = q.reshape(-1, 256) * (d != 0)  # a block of zeros is all zero bits
    low, high = pack(q, 2, 64), pack(q, 4, 32, shift=4)
    return torch.cat([low, high, sc.to(torch.int8).view(torch.uint8), half(d)], 1)


def _affine(
    x: Tensor, importance: Tensor | None, searches: Searches, n: int, levels: int, grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(d [blocks, 1], sc [blocks, groups], dmin, m, q [blocks, 256]) for groups of n values.

    grid: what is tried without importance.
    """
    groups = x.reshape(-1, n)
    if importance is not None:
        weight = weighted(x, importance, searches, 256, 1.0 if n == 16 else 2.0).reshape(-1, n)
        total = searches.sums(weight).reshape(-1, 256 // n)
        scale, low, q = searches.affine(groups, weight, Grid(grid.levels, -0.9, 0.05, 37))
        d, sc = searches.positive(scale.reshape(total.shape), total, levels)
        dmin, m = searches.positive(low.reshape(total.shape), total, levels)
        d, dmin = d[:, None], dmin[:, None]
    else:
        scale, low, q = searches.affine(groups, None, grid)
        d, sc = _unit(scale.reshape(-1, 256 // n), levels)
        dmin, m = _unit(low.reshape(-1, 256 // n), levels)
    searches.round_affine(groups, _decoded(d, sc), _decoded(dmin, m), grid.levels, q)
    return d, sc, dmin, m, q.reshape(-1, 256)


def _unit(scale: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Largest scale / levels, [blocks, 1], and each scale in that unit, in uint8. scale: [blocks, groups]."""
    most = scale.amax(1, keepdim=True).clamp_(min=0) + 0.0  # no negative zero
    per_unit = torch.where(most > 0, constant(levels, most) / most, 0.0)
    codes = (scale * per_unit).round_().clamp_(0, levels)
    return most / constant(levels, most), codes.to(torch.uint8)


def _signed_unit(scale: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """-(widest scale) / limit, [blocks, 1], and each scale in that unit, -limit..limit - 1, in float32."""
    most = widest(scale)
    per_unit = torch.where(most == 0, 0.0, constant(-limit, most) / most)
    return inverse(per_unit), (scale * per_unit).round_().clamp_(-limit, limit - 1)


def _decoded(d: Tensor, codes: Tensor) -> Tensor:
    """What a reader will compute of d [blocks, 1] and codes [blocks, groups]: one number for each group."""
    return (d.to(torch.float16).float() * codes).reshape(-1)


def _six_bits(sc: Tensor, m: Tensor) -> Tensor:
    """8 scales and 8 minimums of 6 bits in 12 bytes: groups 0-3 whole, of 4-7 the top bits above them."""
    upper = (sc[:, :4] | (sc[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6)
    return torch.cat([*upper, (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4], 1)
