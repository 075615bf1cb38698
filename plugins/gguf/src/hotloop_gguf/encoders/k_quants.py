"""Blocks of 256 values in groups with scales of their own: Q4_K, Q5_K, Q6_K.

Every public function takes x [blocks, 256] in float32 and gives the blocks' bytes, [blocks, bytes] in
uint8. Layouts: ggml's `ggml-common.h`. A group's scale (and minimum) is the one of a grid of candidates
with the least weighted squared error, by weighted least squares; then the scales are themselves
quantised, and the values rounded again with what a reader will decode. Where ggml stops there, this
also tries the neighbours of the quantised scales, which costs a little and lowers the error.

Inside, the values of a group lie along the first axis (shapes [group, groups] and [1, groups]): sums over
a group then add whole rows of memory, which a CPU does twice as fast as adding 32 neighbours.
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
    groups = x.reshape(-1, 16).T.contiguous()
    scale = _symmetric_search(groups, 32).reshape(-1, 16)
    widest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    inverse = torch.where(widest.abs() < _TINY, 0.0, -128.0 / widest)
    d = _inverse(inverse).to(torch.float16)
    sc = (scale * inverse).round_().clamp_(max=127)
    sc, q = _nearby(groups, d.float(), sc)
    q = (q + 32).to(torch.uint8).T.reshape(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    low = torch.cat([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    scales = sc.to(torch.int8).view(torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), scales, d.view(torch.uint8)], 1)


def _affine(
    x: Tensor, *, levels: int, first: float, step: float, steps: int
) -> tuple[Tensor, Tensor]:
    """(d, dmin and packed scales [blocks, 16], q [blocks, 8, 32]), all in uint8."""
    groups = x.reshape(-1, 32).T.contiguous()
    scale, low = _affine_search(groups, levels, first, step, steps)
    scale, low = scale.reshape(-1, 8), low.reshape(-1, 8)
    unit, low_unit = (part.amax(1, keepdim=True) / 63 for part in (scale, low))
    d, dmin = unit.to(torch.float16), low_unit.to(torch.float16)
    sc = (scale * _inverse(unit)).round_().clamp_(max=63)
    m = (low * _inverse(low_unit)).round_().clamp_(max=63)
    sc, m, q = _nearby_affine(groups, d.float(), dmin.float(), sc, m, levels)
    packed = _pack_six_bits(sc.to(torch.uint8), m.to(torch.uint8))
    head = torch.cat([d.view(torch.uint8), dmin.view(torch.uint8), packed], 1)
    return head, q.to(torch.uint8).T.reshape(-1, 8, 32)


def _affine_search(
    x: Tensor, levels: int, first: float, step: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Scale s and minimum m >= 0 of each group, x about s q - m, q in 0..levels; both [1, groups].

    Candidates are q = round((first + i step + levels)(x + m)/(max + m)) with the best m so far; for
    each, s and m solve the weighted normal equations, and the error follows from the same sums.
    """
    weight = x.square().mean(0, keepdim=True).sqrt_() + x.abs()
    low = x.amin(0, keepdim=True).clamp_(max=0.0)
    high = x.amax(0, keepdim=True)
    wx = weight * x
    sum_w, sum_x = weight.sum(0, keepdim=True), wx.sum(0, keepdim=True)
    sum_xx = (wx * x).sum(0, keepdim=True)

    scale, offset = (high - low) / levels, low
    best = torch.full_like(sum_w, torch.inf)
    for i in range(-1, steps):
        stretch = levels if i < 0 else first + i * step + levels
        q = (x - offset).mul_(stretch * _inverse(high - offset)).round_().clamp_(0, levels)
        wq = weight * q
        sum_q = wq.sum(0, keepdim=True)
        sum_qq = wq.mul_(q).sum(0, keepdim=True)
        sum_qx = q.mul_(wx).sum(0, keepdim=True)
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
    """The best of each group's quantised scale and minimum and their neighbours, and q for it.

    x: [32, groups]; d, dmin: [blocks, 1]; sc, m: [blocks, 8].
    """

    def rounded(sc: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, low = (d * sc).reshape(1, -1), (dmin * m).reshape(1, -1)
        return (x + low).mul_(_inverse(s)).round_().clamp_(0, levels), s, low

    best = torch.full_like(sc, torch.inf)
    kept_sc, kept_m = sc, m
    for up in (0, -1, 1):
        for right in (0, -1, 1):
            near_sc, near_m = (sc + up).clamp_(0, 63), (m + right).clamp_(0, 63)
            q, s, low = rounded(near_sc, near_m)
            error = q.mul_(s).sub_(low).sub_(x).square_().sum(0).reshape(sc.shape)
            better = error < best
            best = torch.where(better, error, best)
            kept_sc, kept_m = (
                torch.where(better, near_sc, kept_sc),
                torch.where(better, near_m, kept_m),
            )
    return kept_sc, kept_m, rounded(kept_sc, kept_m)[0]


def _symmetric_search(x: Tensor, limit: int) -> Tensor:
    """Scale s of each group, x about s q, q in -limit..limit-1; [1, groups]. Weights are x^2."""
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True))
    unit = x * torch.where(extreme.abs() < _TINY, 0.0, -1.0 / extreme)
    weight = x.square()
    wx = weight * x
    scale = torch.zeros_like(extreme)
    best = torch.zeros_like(extreme)
    for i in (0, *range(-9, 0), *range(1, 10)):
        q = (unit * (limit + 0.1 * i)).round_().clamp_(-limit, limit - 1)
        sum_qx = (q * wx).sum(0, keepdim=True)
        sum_qq = q.square_().mul_(weight).sum(0, keepdim=True)
        s = sum_qx * _inverse(sum_qq)
        better = s * sum_qx > best  # what the error loses against s = 0
        best = torch.where(better, s * sum_qx, best)
        scale = torch.where(better, s, scale)
    return scale


def _nearby(x: Tensor, d: Tensor, sc: Tensor) -> tuple[Tensor, Tensor]:
    """The best of each group's quantised scale and its neighbours, and q for it.

    x: [16, groups]; d: [blocks, 1]; sc: [blocks, 16].
    """

    def rounded(sc: Tensor) -> tuple[Tensor, Tensor]:
        s = (d * sc).reshape(1, -1)
        return (x * _inverse(s)).round_().clamp_(-32, 31), s

    best = torch.full_like(sc, torch.inf)
    kept = sc
    for up in (0, -1, 1):
        near = (sc + up).clamp_(-128, 127)
        q, s = rounded(near)
        error = q.mul_(s).sub_(x).square_().sum(0).reshape(sc.shape)
        better = error < best
        best = torch.where(better, error, best)
        kept = torch.where(better, near, kept)
    return kept, rounded(kept)[0]


def _pack_six_bits(sc: Tensor, m: Tensor) -> Tensor:
    """8 scales and 8 minimums of 6 bits in 12 bytes: groups 0-3 whole, of 4-7 the top bits above them."""
    upper = (sc[:, :4] | (sc[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6)
    return torch.cat([*upper, (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4], 1)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1.0 / d)
