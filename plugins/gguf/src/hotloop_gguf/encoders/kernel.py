"""The searches of `Searches` in Triton: one thread a group, its values one after the other.

Equations, order of the sums and rounding are those of `lanes`, so the results have the same bits: launch
with `enable_fp_fusion=False`, divide with `div_rn`. Every tensor of values is transposed, [n, G], so that
neighbouring threads read neighbouring addresses, and a group is read again for each candidate from the
first-level cache. n is a compile-time constant and the loops over it are unrolled by 8: in full they took
a minute to compile and 220 registers. n G < 2^31.
"""

from __future__ import annotations

from itertools import pairwise

import triton
import triton.language as tl

from .searches import TINY
from .tables import IQ4, MIDDLES

THREADS = 128
"""Groups in a program, one to a thread: 32 to 96 registers each leave 20 warps or more to a processor."""
_TINY = tl.constexpr(TINY)
_ROUND = tl.constexpr(1.5 * 2**23)
_MIDDLES = tl.constexpr(MIDDLES)
_GAPS = tl.constexpr(tuple(float(b - a) for a, b in pairwise(IQ4)))
_FIRST = tl.constexpr(float(IQ4[0]))


@triton.jit
def _level(x, low, high):
    return tl.maximum(low, tl.minimum(high, (x + _ROUND) - _ROUND))


@triton.jit
def _weight(w, x, at, here, GIVEN: tl.constexpr):
    return tl.load(w + at, mask=here, other=0.0) if GIVEN else x * x


@triton.jit
def _groups(groups, THREADS: tl.constexpr):
    g = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    return g, g < groups


@triton.jit
def sums(x, out, groups, n, THREADS: tl.constexpr):
    """out = the sum over each group, from its first value on. n may be large: it is no constant here."""
    g, here = _groups(groups, THREADS)
    total = tl.zeros([THREADS], tl.float32)
    for j in range(n):
        total += tl.load(x + j * groups + g, mask=here, other=0.0)
    tl.store(out + g, total, mask=here)


@triton.jit
def _affine_weight(w, value, at, here, size, GIVEN: tl.constexpr):
    return tl.load(w + at, mask=here, other=0.0) if GIVEN else size + tl.abs(value)


@triton.jit
def _affine_error(
    x, w, size, s, o, inverse, low, levels, groups, g, here,
    N: tl.constexpr, GIVEN: tl.constexpr, ABSOLUTE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Weighted error of x about s q + o, q = round(inverse (x - low))."""
    error = tl.zeros([THREADS], tl.float32)
    for j in tl.range(N, loop_unroll_factor=8):
        value = tl.load(x + j * groups + g, mask=here, other=0.0)
        weight = _affine_weight(w, value, j * groups + g, here, size, GIVEN)
        off = s * _level(inverse * (value - low), 0.0, levels) + o - value
        error += weight * (tl.abs(off) if ABSOLUTE else off * off)
    return error


@triton.jit
def affine(
    x, w, scale, low, q, groups, levels, first, step, steps,
    N: tl.constexpr, GIVEN: tl.constexpr, ABSOLUTE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """`Searches.affine`. x, w: [N, groups] float32; scale, low: [groups]; q: [N, groups] uint8."""
    g, here = _groups(groups, THREADS)
    zero = tl.zeros([THREADS], tl.float32)
    size = zero
    if not GIVEN and not ABSOLUTE:
        for j in tl.range(N, loop_unroll_factor=8):
            value = tl.load(x + j * groups + g, mask=here, other=0.0)
            size += value * value
        size = tl.sqrt_rn(size * (1.0 / N))  # N is a power of two
    lows = tl.load(x + g, mask=here, other=0.0)
    highs = lows
    w_sum, wx_sum = zero, zero
    for j in tl.range(N, loop_unroll_factor=8):
        value = tl.load(x + j * groups + g, mask=here, other=0.0)
        weight = _affine_weight(w, value, j * groups + g, here, size, GIVEN)
        lows = tl.minimum(lows, value)
        highs = tl.maximum(highs, value)
        w_sum += weight
        wx_sum += weight * value
    lows = tl.minimum(lows, 0.0)
    flat = highs == lows
    best_inverse = tl.div_rn(zero + levels, highs - lows)
    best_s = tl.div_rn(zero + 1.0, best_inverse)
    best_o = lows
    best_error = _affine_error(
        x, w, size, best_s, lows, best_inverse, lows, levels, groups, g, here,
        N, GIVEN, ABSOLUTE, THREADS,
    )  # fmt: skip
    best_error = tl.where(flat, -1.0, best_error)
    for trial in range(steps):
        inverse = tl.div_rn(first + step * (zero + trial) + levels, highs - lows)
        q_sum, qq_sum, qx_sum = zero, zero, zero
        for j in tl.range(N, loop_unroll_factor=8):
            value = tl.load(x + j * groups + g, mask=here, other=0.0)
            weight = _affine_weight(w, value, j * groups + g, here, size, GIVEN)
            level = _level(inverse * (value - lows), 0.0, levels)
            weighted = weight * level
            q_sum += weighted
            qq_sum += weighted * level
            qx_sum += weighted * value
        determinant = w_sum * qq_sum - q_sum * q_sum
        slope = tl.div_rn(w_sum * qx_sum - wx_sum * q_sum, determinant)
        offset = tl.div_rn(qq_sum * wx_sum - q_sum * qx_sum, determinant)
        s = tl.where(offset > 0, tl.div_rn(qx_sum, qq_sum), slope)
        o = tl.where(offset > 0, 0.0, offset)
        error = _affine_error(
            x, w, size, s, o, inverse, lows, levels, groups, g, here, N, GIVEN, ABSOLUTE, THREADS
        )
        better = (determinant > 0) & (error < best_error)
        best_error = tl.where(better, error, best_error)
        best_s = tl.where(better, s, best_s)
        best_inverse = tl.where(better, inverse, best_inverse)
        best_o = tl.where(better, lows, best_o)
        lows = tl.where(better, o, lows)
    best_inverse = tl.where(flat, 0.0, best_inverse)
    for j in tl.range(N, loop_unroll_factor=8):
        value = tl.load(x + j * groups + g, mask=here, other=0.0)
        level = _level(best_inverse * (value - best_o), 0.0, levels)
        tl.store(q + j * groups + g, level.to(tl.int32).to(tl.uint8), mask=here)
    tl.store(scale + g, tl.where(flat, 0.0, best_s), mask=here)
    tl.store(low + g, -lows, mask=here)


@triton.jit
def _extreme(x, groups, g, here, N: tl.constexpr, THREADS: tl.constexpr):
    farthest = tl.zeros([THREADS], tl.float32)
    for j in tl.range(N, loop_unroll_factor=8):
        value = tl.load(x + j * groups + g, mask=here, other=0.0)
        farthest = tl.where(tl.abs(value) > tl.abs(farthest), value, farthest)
    return farthest


@triton.jit
def _descend(
    x, w, q, xq_sum, qq_sum, least, most, groups, g, here, N: tl.constexpr, GIVEN: tl.constexpr
):  # fmt: skip
    """Five rounds of coordinate descent on q [N, groups] float32; the sums that they end with."""
    for j in range(5 * N):
        at = (j % N) * groups + g
        value = tl.load(x + at, mask=here, other=0.0)
        weight = _weight(w, value, at, here, GIVEN)
        old = tl.load(q + at, mask=here, other=0.0)
        weighted = weight * value
        xq = xq_sum - weighted * old
        qq = qq_sum - weight * old * old
        new = _level(tl.div_rn(value * qq, xq), least, most)
        new_xq = xq + weighted * new
        new_qq = qq + weight * new * new
        better = new_xq * new_xq * qq_sum > xq_sum * xq_sum * new_qq
        positive = tl.where(least == 0, qq, new_qq) > 0
        better = better & (xq > 0) & positive & (new != old)
        tl.store(q + at, new, mask=here & better)
        xq_sum = tl.where(better, new_xq, xq_sum)
        qq_sum = tl.where(better, new_qq, qq_sum)
    return xq_sum, qq_sum


@triton.jit
def symmetric(
    x, w, scale, q, groups, limit,
    N: tl.constexpr, GIVEN: tl.constexpr, DESCEND: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """`Searches.symmetric` and `descent`. x, w, q: [N, groups] float32; scale: [groups]."""
    g, here = _groups(groups, THREADS)
    zero = tl.zeros([THREADS], tl.float32)
    farthest = _extreme(x, groups, g, here, N, THREADS)
    some = tl.abs(farthest) >= _TINY
    best_s, best, best_inverse = zero, zero, zero
    xq_sum, qq_sum = zero, zero
    trials = 1 if DESCEND else 20
    for trial in range(trials):
        if trial != 10:  # 0 was the first, then come -9..9
            stretch = tl.where(trial == 0, limit, limit + (zero + (trial - 10)) * 0.1)
            inverse = tl.div_rn(zero - stretch, farthest)
            xq_sum, qq_sum = zero, zero
            for j in tl.range(N, loop_unroll_factor=8):
                value = tl.load(x + j * groups + g, mask=here, other=0.0)
                weight = _weight(w, value, j * groups + g, here, GIVEN)
                level = _level(inverse * value, -limit, limit - 1)
                xq_sum += weight * value * level
                qq_sum += weight * level * level
            better = (qq_sum > 0) & (xq_sum * xq_sum > best * qq_sum)
            better = better | (trial == 0)
            s = tl.where(qq_sum != 0, tl.div_rn(xq_sum, qq_sum), 0.0)
            best_s = tl.where(better, s, best_s)
            best = tl.where(better, s * xq_sum, best)
            best_inverse = tl.where(better, inverse, best_inverse)
    for j in tl.range(N, loop_unroll_factor=8):
        value = tl.load(x + j * groups + g, mask=here, other=0.0)
        level = _level(best_inverse * value, -limit, limit - 1)
        tl.store(q + j * groups + g, level, mask=here)
    if DESCEND:
        xq_sum, qq_sum = _descend(
            x, w, q, xq_sum, qq_sum, -limit, limit - 1, groups, g, here, N, GIVEN
        )
        best_s = tl.where(qq_sum > 0, tl.div_rn(xq_sum, qq_sum), 0.0)
    for j in tl.range(N, loop_unroll_factor=8):
        level = tl.load(q + j * groups + g, mask=here, other=0.0)
        tl.store(q + j * groups + g, tl.where(some, level + limit, 0.0), mask=here)
    tl.store(scale + g, tl.where(some, best_s, 0.0), mask=here)


@triton.jit
def positive(x, w, scale, q, groups, levels, N: tl.constexpr, THREADS: tl.constexpr):
    """`Searches.positive`. x, w, q: [N, groups] float32; scale: [groups]."""
    g, here = _groups(groups, THREADS)
    zero = tl.zeros([THREADS], tl.float32)
    high = zero
    for j in tl.range(N, loop_unroll_factor=8):
        high = tl.maximum(high, tl.load(x + j * groups + g, mask=here, other=0.0))
    best, best_inverse = zero, zero
    for trial in range(10):
        if trial != 5:  # 0 was the first, then come -4..4
            stretch = tl.where(trial == 0, levels, (zero + (trial - 5)) * 0.1 + levels)
            inverse = tl.div_rn(zero + stretch, high)
            s = tl.div_rn(zero + 1.0, inverse)
            error = zero
            for j in tl.range(N, loop_unroll_factor=8):
                value = tl.load(x + j * groups + g, mask=here, other=0.0)
                weight = tl.load(w + j * groups + g, mask=here, other=0.0)
                off = value - s * tl.minimum(levels, (inverse * value + _ROUND) - _ROUND)
                error += weight * off * off
            better = (trial == 0) | (error < best)
            best = tl.where(better, error, best)
            best_inverse = tl.where(better, inverse, best_inverse)
    xq_sum, qq_sum = zero, zero
    for j in tl.range(N, loop_unroll_factor=8):
        value = tl.load(x + j * groups + g, mask=here, other=0.0)
        weight = tl.load(w + j * groups + g, mask=here, other=0.0)
        level = tl.minimum(levels, (best_inverse * value + _ROUND) - _ROUND)
        xq_sum += weight * value * level
        qq_sum += weight * level * level
        tl.store(q + j * groups + g, level, mask=here)
    xq_sum, qq_sum = _descend(x, w, q, xq_sum, qq_sum, 0.0, levels, groups, g, here, N, True)
    some = high >= _TINY
    for j in tl.range(N, loop_unroll_factor=8):
        level = tl.load(q + j * groups + g, mask=here, other=0.0)
        tl.store(q + j * groups + g, tl.where(some, level, 0.0), mask=here)
    solved = tl.where(qq_sum > 0, tl.div_rn(xq_sum, qq_sum), 0.0)
    tl.store(scale + g, tl.where(some, solved, 0.0), mask=here)


@triton.jit
def _table_value(scaled):
    value = tl.zeros_like(scaled) + _FIRST
    for m in tl.static_range(15):
        value += tl.where(scaled >= _MIDDLES[m], _GAPS[m], 0.0)
    return value


@triton.jit
def table(
    x, w, scale, groups, N: tl.constexpr, GIVEN: tl.constexpr, THREADS: tl.constexpr
):  # fmt: skip
    """`Searches.table`. x, w: [N, groups] float32; scale: [groups]."""
    g, here = _groups(groups, THREADS)
    zero = tl.zeros([THREADS], tl.float32)
    farthest = _extreme(x, groups, g, here, N, THREADS)
    plain = tl.div_rn(zero + 1.0, tl.div_rn(-farthest, zero + _FIRST))
    best_s, best = zero, zero
    for trial in range(16):
        inverse = tl.div_rn(zero + (trial - 8) + _FIRST, farthest)
        inverse = tl.where(trial == 0, plain, inverse)
        xv_sum, vv_sum = zero, zero
        for j in tl.range(N, loop_unroll_factor=8):
            value = tl.load(x + j * groups + g, mask=here, other=0.0)
            weight = _weight(w, value, j * groups + g, here, GIVEN)
            v = _table_value(inverse * value)
            xv_sum += weight * v * value
            vv_sum += weight * v * v
        better = (vv_sum > 0) & (xv_sum * xv_sum > best * vv_sum)
        better = better | (trial == 0)
        s = tl.where(vv_sum > 0, tl.div_rn(xv_sum, vv_sum), 0.0)
        best_s = tl.where(better, s, best_s)
        best = tl.where(better, s * xv_sum, best)
    tl.store(scale + g, tl.where(tl.abs(farthest) >= _TINY, best_s, 0.0), mask=here)
