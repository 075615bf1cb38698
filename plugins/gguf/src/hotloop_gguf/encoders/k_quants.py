"""Blocks of 256 values in groups with scales of their own: Q4_K, Q5_K, Q6_K.

Every function takes x [blocks, 256] in float32 and gives the blocks' bytes, [blocks, bytes] in uint8.
Layouts: ggml's `ggml-common.h`. A group's scale (and minimum) is the one of a grid of candidates with
the least weighted squared error, by weighted least squares; then the scales are themselves quantised,
and the values rounded again with what a reader will decode. Where ggml stops there, this also tries
the neighbours of the quantised scales, which costs a little and lowers the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-15
"""Below this a group counts as zero, as in ggml."""


def q4_k(x: Tensor) -> Tensor:
    """float16 d, float16 dmin, 12 bytes of 6-bit scales and minimums, 128 bytes of two q.

    8 groups of 32: x = d sc q - dmin m, q in 0..15.
    """
    head, q = _affine(x, levels=15, first=-1.0, step=0.1, steps=21)
    pairs = q.reshape(-1, 4, 2, 32)
    return torch.cat([head, (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)], 1)


def q5_k(x: Tensor) -> Tensor:
    """The same with q in 0..31: before the low nibbles 32 bytes of fifth bits, bit j of group j."""
    head, q = _affine(x, levels=31, first=-0.5, step=0.1, steps=16)
    places = torch.arange(8, dtype=torch.uint8, device=x.device).reshape(8, 1)
    fifth = ((q >> 4) << places).sum(1, dtype=torch.uint8)
    pairs = (q & 15).reshape(-1, 4, 2, 32)
    return torch.cat([head, fifth, (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)], 1)


def q6_k(x: Tensor) -> Tensor:
    """128 bytes of low nibbles, 64 bytes of upper bit pairs, 16 int8 scales, float16 d.

    16 groups of 16: x = d sc q, q in -32..31.
    """
    groups = x.reshape(-1, 16)
    scale = _symmetric_search(groups, 32).reshape(-1, 16, 1)
    widest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    inverse = torch.where(widest.abs() < _TINY, 0.0, -128.0 / widest)
    d = _inverse(inverse).to(torch.float16)
    sc = (scale * inverse).round_().clamp_(max=127)
    sc, q = _nearby(groups.reshape(-1, 16, 16), d.float(), sc)
    q = (q + 32).to(torch.uint8).reshape(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    low = torch.cat([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    scales = sc.flatten(1).to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), scales, d.flatten(1).view(torch.uint8)], 1)


def _affine(
    x: Tensor, *, levels: int, first: float, step: float, steps: int
) -> tuple[Tensor, Tensor]:
    """(d, dmin and packed scales [blocks, 16], q [blocks, 8, 32]), all in uint8."""
    groups = x.reshape(-1, 32)
    weight = groups.square().mean(1, keepdim=True).sqrt_() + groups.abs()
    scale, low = _affine_search(groups, weight, levels, first, step, steps)
    scale, low = scale.reshape(-1, 8, 1), low.reshape(-1, 8, 1)
    d = (scale.amax(1, keepdim=True) / 63).to(torch.float16)
    dmin = (low.amax(1, keepdim=True) / 63).to(torch.float16)
    sc = (scale * _inverse(scale.amax(1, keepdim=True) / 63)).round_().clamp_(max=63)
    m = (low * _inverse(low.amax(1, keepdim=True) / 63)).round_().clamp_(max=63)
    blocks = groups.reshape(-1, 8, 32)
    sc, m, q = _nearby_affine(blocks, d.float(), dmin.float(), sc, m, levels)
    halves = [half.flatten(1).view(torch.uint8) for half in (d, dmin)]
    packed = _pack_six_bits(sc.flatten(1).to(torch.uint8), m.flatten(1).to(torch.uint8))
    return torch.cat([*halves, packed], 1), q.to(torch.uint8)


def _affine_search(
    x: Tensor, weight: Tensor, levels: int, first: float, step: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Scale s and minimum m >= 0 of each group, x about s q - m, q in 0..levels; both [groups, 1].

    Candidates are q = round((first + i step + levels)(x + m)/(max + m)) with the best m so far; for
    each, s and m solve the weighted normal equations, and the error follows from the same sums.
    """
    low = x.amin(1, keepdim=True).clamp_(max=0.0)
    high = x.amax(1, keepdim=True)
    wx = weight * x
    sum_w, sum_x = weight.sum(1, keepdim=True), wx.sum(1, keepdim=True)
    sum_xx = (wx * x).sum(1, keepdim=True)

    scale, offset = (high - low) / levels, low
    best = torch.full_like(sum_w, torch.inf)
    for i in range(-1, steps):
        stretch = levels if i < 0 else first + i * step + levels
        q = ((x - offset) * (stretch * _inverse(high - offset))).round_().clamp_(0, levels)
        wq = weight * q
        sum_q = wq.sum(1, keepdim=True)
        sum_qx = (q * wx).sum(1, keepdim=True)
        sum_qq = wq.mul_(q).sum(1, keepdim=True)
        if i < 0:
            s, o = scale, offset
        else:
            determinant = sum_w * sum_qq - sum_q * sum_q
            inverse = torch.where(determinant > 0, 1.0 / determinant, torch.nan)
            s = (sum_w * sum_qx - sum_x * sum_q) * inverse
            o = (sum_qq * sum_x - sum_q * sum_qx) * inverse
            s = torch.where(o > 0, sum_qx / sum_qq, s)
            o = o.clamp(max=0.0)
        error = s * (s * sum_qq + 2 * (o * sum_q - sum_qx)) + o * (o * sum_w - 2 * sum_x) + sum_xx
        better = error < best  # a NaN, from a determinant of 0, is not
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    return scale, -offset


def _nearby_affine(
    x: Tensor, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of each group's quantised scale and minimum and their neighbours, and q for it."""
    best = torch.full_like(sc, torch.inf)
    kept_sc, kept_m, kept_q = sc, m, torch.empty_like(x)
    for up in (0, -1, 1):
        for right in (0, -1, 1):
            near_sc, near_m = (sc + up).clamp_(0, 63), (m + right).clamp_(0, 63)
            s, low = d * near_sc, dmin * near_m
            q = ((x + low) * _inverse(s)).round_().clamp_(0, levels)
            error = (q * s - low - x).square_().sum(2, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            kept_sc, kept_m = (
                torch.where(better, near_sc, kept_sc),
                torch.where(better, near_m, kept_m),
            )
            kept_q = torch.where(better, q, kept_q)
    return kept_sc, kept_m, kept_q


def _symmetric_search(x: Tensor, limit: int) -> Tensor:
    """Scale s of each group, x about s q, q in -limit..limit-1; [groups, 1]. Weights are x^2."""
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))
    unit = x * torch.where(extreme.abs() < _TINY, 0.0, -1.0 / extreme)
    weight = x.square()
    wx = weight * x
    scale = torch.zeros_like(extreme)
    best = torch.zeros_like(extreme)
    for i in (0, *range(-9, 0), *range(1, 10)):
        q = (unit * (limit + 0.1 * i)).round_().clamp_(-limit, limit - 1)
        sum_qx = (q * wx).sum(1, keepdim=True)
        sum_qq = q.square_().mul_(weight).sum(1, keepdim=True)
        s = sum_qx * _inverse(sum_qq)
        better = s * sum_qx > best  # what the error loses against s = 0
        best = torch.where(better, s * sum_qx, best)
        scale = torch.where(better, s, scale)
    return scale


def _nearby(x: Tensor, d: Tensor, sc: Tensor) -> tuple[Tensor, Tensor]:
    """The best of each group's quantised scale and its neighbours, and q for it."""
    best = torch.full_like(sc, torch.inf)
    kept_sc, kept_q = sc, torch.empty_like(x)
    for up in (0, -1, 1):
        near = (sc + up).clamp_(-128, 127)
        s = d * near
        q = (x * _inverse(s)).round_().clamp_(-32, 31)
        error = (q * s - x).square_().sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        kept_sc, kept_q = torch.where(better, near, kept_sc), torch.where(better, q, kept_q)
    return kept_sc, kept_q


def _pack_six_bits(sc: Tensor, m: Tensor) -> Tensor:
    """8 scales and 8 minimums of 6 bits in 12 bytes: groups 0-3 whole, of 4-7 the top bits above them."""
    upper = (sc[:, :4] | (sc[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6)
    return torch.cat([*upper, (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4], 1)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1.0 / d)
