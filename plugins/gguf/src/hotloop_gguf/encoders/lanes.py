"""The searches of `Searches` on a CPU, compiled by numba: 64 groups side by side.

Values are first laid so that those with the same place in 64 groups are neighbours in memory: the
innermost loop runs over the groups, so that it becomes vector instructions although no sum may be
reordered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from .searches import TINY
from .tables import IQ4, MIDDLES

if TYPE_CHECKING:
    from collections.abc import Callable

LANES = 64
"""Groups side by side: four vectors of 512 bits, enough to hide the latency of their sums."""
_ZERO, _ONE, _HALF, _INFINITE = (np.float32(x) for x in (0, 1, 0.5, np.inf))
_TENTH = np.float32(0.1)
_ROUND = np.float32(1.5 * 2**23)
"""Adding and subtracting it rounds half to even, for |x| < 2^22."""
_TINY = np.float32(TINY)
_MIDDLES = np.array(MIDDLES, np.float32)
_GAPS = np.diff(np.array(IQ4, np.float32))
_FIRST = np.float32(IQ4[0])

_inlined = numba.njit(inline="always", error_model="numpy")


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled at its first call, and kept on disk if numba finds a folder that it may write to."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:
        return numba.njit(function, **options)


@_inlined
def round_even(x: Any) -> Any:
    """The nearest whole number, halves to even."""
    return (x + _ROUND) - _ROUND


@_inlined
def clamp(x: Any, low: Any, high: Any) -> Any:
    """Into low..high; a NaN becomes one of them."""
    return max(low, min(high, x))


@_inlined
def _load(x: Any, start: int, lanes: int, tile: Any) -> None:
    n = x.shape[1]
    for i in range(lanes):
        for j in range(n):
            tile[j * LANES + i] = x[start + i, j]


@_inlined
def _load_weights(w: Any, xs: Any, start: int, lanes: int, ws: Any) -> None:
    if len(w):
        _load(w, start, lanes, ws)
    else:
        for k in range(xs.size):
            ws[k] = xs[k] * xs[k]


@_inlined
def _store(tile: Any, start: int, lanes: int, q: Any) -> None:
    n = q.shape[1]
    for i in range(lanes):
        for j in range(n):
            q[start + i, j] = np.uint8(tile[j * LANES + i])


@_inlined
def _clear(sums: Any) -> None:
    for i in range(sums.size):
        sums[i] = _ZERO


@_inlined
def _extreme(tile: Any, n: int, farthest: Any) -> None:
    _clear(farthest)
    for j in range(n):
        for i in range(LANES):
            x = tile[j * LANES + i]
            farthest[i] = x if abs(x) > abs(farthest[i]) else farthest[i]


@compiled
def affine(
    x: Any, w: Any, levels: Any, first: Any, step: Any, steps: int, absolute: bool,
    scale: Any, low: Any, q: Any,
) -> None:  # fmt: skip
    """`Searches.affine`; w is empty where there is none."""
    n = x.shape[1]
    xs, ws = np.zeros(n * LANES, np.float32), np.zeros(n * LANES, np.float32)
    qs, sums = np.empty(n * LANES, np.float32), np.empty(3 * LANES, np.float32)
    state = np.empty((12, LANES), np.float32)
    w_sum, wx_sum, lows, highs, inverse, s, o, error = (
        state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7],
    )  # fmt: skip
    best_error, best_s, best_inverse, best_o = state[8], state[9], state[10], state[11]
    for start in range(0, len(x), LANES):
        lanes = min(LANES, len(x) - start)
        _load(x, start, lanes, xs)
        _load_weights(w, xs, start, lanes, ws)
        if len(w) == 0:
            _clear(sums)
            for j in range(n):
                for i in range(LANES):
                    sums[i] += ws[j * LANES + i]
            for i in range(LANES):
                sums[i] = _ZERO if absolute else np.sqrt(sums[i] / np.float32(n))
            for j in range(n):
                for i in range(LANES):
                    ws[j * LANES + i] = sums[i] + abs(xs[j * LANES + i])
        for i in range(LANES):
            lows[i], highs[i], w_sum[i], wx_sum[i] = xs[i], xs[i], _ZERO, _ZERO
        for j in range(n):
            for i in range(LANES):
                value, weight = xs[j * LANES + i], ws[j * LANES + i]
                lows[i] = value if value < lows[i] else lows[i]
                highs[i] = value if value > highs[i] else highs[i]
                w_sum[i] += weight
                wx_sum[i] += weight * value
        for i in range(LANES):
            lows[i] = min(lows[i], _ZERO)
            inverse[i] = levels / (highs[i] - lows[i])
            s[i], o[i], error[i] = _ONE / inverse[i], lows[i], _ZERO
            best_s[i], best_inverse[i], best_o[i] = _ZERO, _ZERO, lows[i]
            # No candidate is better than the exact 0 of a group that has one value.
            best_error[i] = _INFINITE if highs[i] > lows[i] else -_ONE
        for trial in range(-1, steps):
            if trial >= 0:
                stretch = first + step * np.float32(trial) + levels
                for i in range(LANES):
                    inverse[i] = stretch / (highs[i] - lows[i])
            _clear(sums)
            for j in range(n):
                for i in range(LANES):
                    value = xs[j * LANES + i]
                    level = clamp(round_even(inverse[i] * (value - lows[i])), _ZERO, levels)
                    weighted = ws[j * LANES + i] * level
                    qs[j * LANES + i] = level
                    sums[i] += weighted
                    sums[LANES + i] += weighted * level
                    sums[2 * LANES + i] += weighted * value
            if trial >= 0:
                for i in range(LANES):
                    q_sum, qq_sum, qx_sum = sums[i], sums[LANES + i], sums[2 * LANES + i]
                    determinant = w_sum[i] * qq_sum - q_sum * q_sum
                    slope = (w_sum[i] * qx_sum - wx_sum[i] * q_sum) / determinant
                    offset = (qq_sum * wx_sum[i] - q_sum * qx_sum) / determinant
                    s[i] = qx_sum / qq_sum if offset > _ZERO else slope
                    o[i] = _ZERO if offset > _ZERO else offset
                    # A singular system is no candidate.
                    error[i] = _ZERO if determinant > _ZERO else _INFINITE
            if absolute:
                for j in range(n):
                    for i in range(LANES):
                        k = j * LANES + i
                        error[i] += ws[k] * abs(s[i] * qs[k] + o[i] - xs[k])
            else:
                for j in range(n):
                    for i in range(LANES):
                        k = j * LANES + i
                        off = s[i] * qs[k] + o[i] - xs[k]
                        error[i] += ws[k] * (off * off)
            for i in range(LANES):
                better = error[i] < best_error[i]
                best_error[i] = error[i] if better else best_error[i]
                best_s[i] = s[i] if better else best_s[i]
                best_inverse[i] = inverse[i] if better else best_inverse[i]
                best_o[i] = lows[i] if better else best_o[i]
                lows[i] = o[i] if better else lows[i]
        for j in range(n):
            for i in range(LANES):
                k = j * LANES + i
                qs[k] = clamp(round_even(best_inverse[i] * (xs[k] - best_o[i])), _ZERO, levels)
        _store(qs, start, lanes, q)
        for i in range(lanes):
            scale[start + i], low[start + i] = best_s[i], -lows[i]


@_inlined
def _descend(xs: Any, ws: Any, qs: Any, xq_sum: Any, qq_sum: Any, least: Any, most: Any) -> None:
    """Five rounds: each value's q in turn to what is best for the scale that the others imply."""
    for _ in range(5):
        for j in range(xs.size // LANES):
            for i in range(LANES):
                k = j * LANES + i
                weighted = ws[k] * xs[k]
                xq = xq_sum[i] - weighted * qs[k]
                qq = qq_sum[i] - ws[k] * qs[k] * qs[k]
                level = clamp(round_even(xs[k] * qq / xq), least, most)
                new_xq = xq + weighted * level
                new_qq = qq + ws[k] * level * level
                better = new_xq * new_xq * qq_sum[i] > xq_sum[i] * xq_sum[i] * new_qq
                # ggml asks for a positive rest of q^2 before where q is unsigned, and after where not.
                better &= (xq > _ZERO) & (qq > _ZERO if least == _ZERO else new_qq > _ZERO)
                better &= level != qs[k]
                qs[k] = level if better else qs[k]
                xq_sum[i] = new_xq if better else xq_sum[i]
                qq_sum[i] = new_qq if better else qq_sum[i]


@compiled
def symmetric(x: Any, w: Any, limit: Any, descend: bool, scale: Any, q: Any) -> None:
    """`Searches.symmetric` and, with `descend`, `Searches.descent`; w is empty where there is none."""
    n = x.shape[1]
    xs, ws = np.zeros(n * LANES, np.float32), np.zeros(n * LANES, np.float32)
    qs = np.empty(n * LANES, np.float32)
    state = np.empty((7, LANES), np.float32)
    farthest, inverse, xq_sum, qq_sum = state[0], state[1], state[2], state[3]
    best_s, best_inverse, best = state[4], state[5], state[6]
    for start in range(0, len(x), LANES):
        lanes = min(LANES, len(x) - start)
        _load(x, start, lanes, xs)
        _load_weights(w, xs, start, lanes, ws)
        _extreme(xs, n, farthest)
        for trial in range(1 if descend else 20):
            if trial == 10:
                continue  # 0 was the first, then come -9..9
            stretch = limit if trial == 0 else limit + _TENTH * np.float32(trial - 10)
            _clear(xq_sum)
            _clear(qq_sum)
            for i in range(LANES):
                inverse[i] = -stretch / farthest[i]
            for j in range(n):
                for i in range(LANES):
                    value, weight = xs[j * LANES + i], ws[j * LANES + i]
                    level = clamp(round_even(inverse[i] * value), -limit, limit - _ONE)
                    xq_sum[i] += weight * value * level
                    qq_sum[i] += weight * level * level
            for i in range(LANES):
                better = xq_sum[i] * xq_sum[i] > best[i] * qq_sum[i] if trial else True
                better &= (qq_sum[i] > _ZERO) | (trial == 0)
                s = xq_sum[i] / qq_sum[i] if qq_sum[i] != _ZERO else _ZERO
                best_s[i] = s if better else best_s[i]
                best[i] = s * xq_sum[i] if better else best[i]
                best_inverse[i] = inverse[i] if better else best_inverse[i]
        for j in range(n):
            for i in range(LANES):
                level = round_even(best_inverse[i] * xs[j * LANES + i])
                qs[j * LANES + i] = clamp(level, -limit, limit - _ONE)
        if descend:
            _descend(xs, ws, qs, xq_sum, qq_sum, -limit, limit - _ONE)
            for i in range(LANES):
                best_s[i] = xq_sum[i] / qq_sum[i] if qq_sum[i] > _ZERO else _ZERO
        for i in range(LANES):
            best_s[i] = best_s[i] if abs(farthest[i]) >= _TINY else _ZERO
        for j in range(n):
            for i in range(LANES):
                k = j * LANES + i
                qs[k] = qs[k] + limit if abs(farthest[i]) >= _TINY else _ZERO
        _store(qs, start, lanes, q)
        for i in range(lanes):
            scale[start + i] = best_s[i]


@compiled
def positive(x: Any, w: Any, levels: Any, scale: Any, q: Any) -> None:
    """`Searches.positive`."""
    n = x.shape[1]
    xs, ws = np.zeros(n * LANES, np.float32), np.zeros(n * LANES, np.float32)
    qs = np.empty(n * LANES, np.float32)
    state = np.empty((6, LANES), np.float32)
    high, inverse, error, best = state[0], state[1], state[2], state[3]
    xq_sum, qq_sum = state[4], state[5]
    for start in range(0, len(x), LANES):
        lanes = min(LANES, len(x) - start)
        _load(x, start, lanes, xs)
        _load(w, start, lanes, ws)
        _clear(high)
        for j in range(n):
            for i in range(LANES):
                high[i] = max(high[i], xs[j * LANES + i])
        for trial in range(10):
            if trial == 5:
                continue  # 0 was the first, then come -4..4
            stretch = levels if trial == 0 else _TENTH * np.float32(trial - 5) + levels
            _clear(error)
            for j in range(n):
                for i in range(LANES):
                    k = j * LANES + i
                    trial_inverse = stretch / high[i]
                    level = min(levels, round_even(trial_inverse * xs[k]))
                    off = xs[k] - _ONE / trial_inverse * level
                    error[i] += ws[k] * off * off
            for i in range(LANES):
                better = error[i] < best[i] if trial else True
                best[i] = error[i] if better else best[i]
                inverse[i] = stretch / high[i] if better else inverse[i]
        _clear(xq_sum)
        _clear(qq_sum)
        for j in range(n):
            for i in range(LANES):
                k = j * LANES + i
                level = min(levels, round_even(inverse[i] * xs[k]))
                qs[k] = level
                xq_sum[i] += ws[k] * xs[k] * level
                qq_sum[i] += ws[k] * level * level
        _descend(xs, ws, qs, xq_sum, qq_sum, _ZERO, levels)
        for i in range(lanes):
            some = high[i] >= _TINY
            scale[start + i] = xq_sum[i] / qq_sum[i] if some and qq_sum[i] > _ZERO else _ZERO
            for j in range(n):
                q[start + i, j] = np.uint8(qs[j * LANES + i]) if some else np.uint8(0)


@compiled
def table(x: Any, w: Any, scale: Any) -> None:
    """`Searches.table`; w is empty where there is none."""
    n = x.shape[1]
    xs, ws = np.zeros(n * LANES, np.float32), np.zeros(n * LANES, np.float32)
    state = np.empty((6, LANES), np.float32)
    farthest, inverse, xv_sum, vv_sum = state[0], state[1], state[2], state[3]
    best_s, best = state[4], state[5]
    for start in range(0, len(x), LANES):
        lanes = min(LANES, len(x) - start)
        _load(x, start, lanes, xs)
        _load_weights(w, xs, start, lanes, ws)
        _extreme(xs, n, farthest)
        for trial in range(16):
            for i in range(LANES):
                # First ggml's plain scale, whose last bit may differ from that of the trial in the middle.
                plain = _ONE / (-farthest[i] / _FIRST)
                inverse[i] = (np.float32(trial - 8) + _FIRST) / farthest[i] if trial else plain
            _clear(xv_sum)
            _clear(vv_sum)
            for j in range(n):
                for i in range(LANES):
                    k = j * LANES + i
                    scaled, value = inverse[i] * xs[k], _FIRST
                    for m in range(15):
                        value += _GAPS[m] if scaled >= _MIDDLES[m] else _ZERO
                    xv_sum[i] += ws[k] * value * xs[k]
                    vv_sum[i] += ws[k] * value * value
            for i in range(LANES):
                better = xv_sum[i] * xv_sum[i] > best[i] * vv_sum[i] if trial else True
                better &= (vv_sum[i] > _ZERO) | (trial == 0)
                s = xv_sum[i] / vv_sum[i] if vv_sum[i] > _ZERO else _ZERO
                best_s[i] = s if better else best_s[i]
                best[i] = s * xv_sum[i] if better else best[i]
        for i in range(lanes):
            scale[start + i] = best_s[i] if abs(farthest[i]) >= _TINY else _ZERO
