"""`Searches` on a CPU: the loops of `lanes` and those that need no lanes, compiled by numba."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import lanes
from .lanes import clamp, compiled, round_even
from .parts import FIFTH_BITS, GATHER_BITS, half

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .searches import Grid, Searches, Table

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_BLOCK, _AT_ONCE = 32, 64
"""Values in a block of the types without a search: as a constant, the loops over it become vector instructions.
So do whole numbers by way of int32, and not those by way of anything else."""
_LOW_NIBBLES, _NIBBLE, _TOP_BYTE = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(4), np.uint64(56)
_FIFTH_BITS, _GATHER_BITS = np.uint64(FIFTH_BITS), np.uint64(GATHER_BITS)


@compiled
def _sums(x: Any, out: Any) -> None:
    for g in range(len(x)):
        total = _ZERO
        for j in range(x.shape[1]):
            total += x[g, j]
        out[g] = total


@compiled
def _round_affine(x: Any, scale: Any, low: Any, levels: Any, q: Any) -> None:
    for g in range(len(x)):
        if scale[g] != _ZERO:
            for j in range(x.shape[1]):
                q[g, j] = np.uint8(clamp(round_even((x[g, j] + low[g]) / scale[g]), _ZERO, levels))


@compiled
def _round_symmetric(x: Any, scale: Any, limit: Any, q: Any) -> None:
    for g in range(len(x)):
        if scale[g] != _ZERO:
            for j in range(x.shape[1]):
                level = clamp(round_even(x[g, j] / scale[g]), -limit, limit - _ONE)
                q[g, j] = np.uint8(level + limit)


@compiled
def _largest(x: Any, out: Any) -> None:
    for g in range(len(x)):
        most = _ZERO
        for j in range(_BLOCK):
            value = abs(x[g, j])
            most = value if value > most else most
        out[g] = most


@compiled
def _even(
    x: Any, levels: Any, offset: bool, scale: Any, low: Any, fifth: Any, nibbles: Any
) -> None:
    """Some blocks at a time, so that they stay in the cache. fifth: [G, 4], or [G, 0] where q has four bits.

    nibbles: uint64 [G, 2]. scale and low are float32 [G], for the caller to round.
    """
    inverse = np.empty(_AT_ONCE, np.float32)
    q = np.empty((_AT_ONCE, _BLOCK), np.uint8)
    words = q.view(np.uint64)
    limit = (levels + _ONE) * _HALF
    shift = _HALF if offset else limit + _HALF
    for start in range(0, len(x), _AT_ONCE):
        count = min(_AT_ONCE, len(x) - start)
        for g in range(start, start + count):
            least, most = x[g, 0], x[g, 0]
            for j in range(_BLOCK):
                value = x[g, j]
                least = value if value < least else least
                most = value if value > most else most
            low[g], scale[g] = least, most
        for g in range(start, start + count):
            if offset:
                scale[g] = (scale[g] - low[g]) / levels
            else:
                farthest = scale[g] if scale[g] > -low[g] else low[g]
                if scale[g] == -low[g]:
                    farthest = _ZERO
                    for j in range(_BLOCK):
                        farthest = x[g, j] if abs(x[g, j]) > abs(farthest) else farthest
                scale[g], low[g] = farthest / -limit, _ZERO
            inverse[g - start] = _ONE / scale[g] if scale[g] != _ZERO else _ZERO
        for i in range(count):
            lowest, factor = low[start + i], inverse[i]
            for j in range(_BLOCK):
                scaled = (x[start + i, j] - lowest) * factor + shift
                q[i, j] = np.uint8(np.int32(clamp(scaled, _ZERO, levels)))
        for i in range(count):
            for k in range(2):
                upper = (words[i, k + 2] & _LOW_NIBBLES) << _NIBBLE
                nibbles[start + i, k] = (words[i, k] & _LOW_NIBBLES) | upper
            for k in range(fifth.shape[1]):
                bits = (words[i, k] & _FIFTH_BITS) * _GATHER_BITS
                fifth[start + i, k] = np.uint8(bits >> _TOP_BYTE)


@compiled
def _round_away(x: Any, inverse: Any, q: Any) -> None:
    for g in range(len(x)):
        for j in range(x.shape[1]):
            scaled = x[g, j] * inverse[g]
            whole = np.float32(np.int32(scaled))
            off = scaled - whole
            more = _ONE if off >= _HALF else (-_ONE if off <= -_HALF else _ZERO)
            q[g, j] = np.int8(np.int32(whole + more))


@compiled
def _nearest(x: Any, inverse: Any, middles: Any, codes: Any, q: Any) -> None:
    for g in range(len(x)):
        for j in range(x.shape[1]):
            q[g, j] = 0
        for m in range(middles.size):
            for j in range(x.shape[1]):
                q[g, j] += np.uint8(x[g, j] * inverse[g] >= middles[m])
        for j in range(x.shape[1]):
            q[g, j] = codes[q[g, j]]


class _Cpu:
    def largest(self, x_Gn: Tensor) -> Tensor:
        out = _per_group(x_Gn)
        _call(_largest, x_Gn, out)
        return out

    def sums(self, x_Gn: Tensor) -> Tensor:
        out = _per_group(x_Gn)
        _call(_sums, x_Gn, out)
        return out

    def root(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.sqrt(x.numpy()))

    def affine(
        self, x_Gn: Tensor, weight_Gn: Tensor | None, grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, low, q_Gn = _per_group(x_Gn), _per_group(x_Gn), _levels(x_Gn)
        numbers = (np.float32(grid.levels), np.float32(grid.first), np.float32(grid.step))
        rest = (grid.steps, grid.absolute, scale, low, q_Gn)
        _call(lanes.affine, x_Gn, _given(weight_Gn), *numbers, *rest)
        return scale, low, q_Gn

    def symmetric(
        self, x_Gn: Tensor, weight_Gn: Tensor | None, limit: int
    ) -> tuple[Tensor, Tensor]:
        scale, q_Gn = _per_group(x_Gn), _levels(x_Gn)
        _call(lanes.symmetric, x_Gn, _given(weight_Gn), np.float32(limit), False, scale, q_Gn)
        return scale, q_Gn

    def descent(self, x_Gn: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        scale, q_Gn = _per_group(x_Gn), _levels(x_Gn)
        _call(lanes.symmetric, x_Gn, _given(None), np.float32(limit), True, scale, q_Gn)
        return scale, q_Gn

    def positive(self, x_Gn: Tensor, weight_Gn: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        scale, q_Gn = _per_group(x_Gn), _levels(x_Gn)
        _call(lanes.positive, x_Gn, weight_Gn, np.float32(levels), scale, q_Gn)
        return scale, q_Gn

    def table(self, x_Gn: Tensor, weight_Gn: Tensor | None) -> Tensor:
        scale = _per_group(x_Gn)
        _call(lanes.table, x_Gn, _given(weight_Gn), scale)
        return scale

    def round_affine(
        self, x_Gn: Tensor, scale: Tensor, low: Tensor, levels: int, q_Gn: Tensor
    ) -> None:
        _call(_round_affine, x_Gn, scale, low, np.float32(levels), q_Gn)

    def round_symmetric(self, x_Gn: Tensor, scale: Tensor, limit: int, q_Gn: Tensor) -> None:
        _call(_round_symmetric, x_Gn, scale, np.float32(limit), q_Gn)

    def even(self, x_Gn: Tensor, levels: int, *, offset: bool) -> Tensor:
        scale, low = _per_group(x_Gn), _per_group(x_Gn)
        head, fifths = 4 if offset else 2, 4 if levels > 15 else 0
        out = torch.empty(len(x_Gn), head + fifths + 16, dtype=torch.uint8)
        parts = out[:, head:-16], out.numpy()[:, -16:].view(np.uint64)
        _call(_even, x_Gn, np.float32(levels), offset, scale, low, *parts)
        out[:, :2] = half(scale[:, None])
        if offset:
            out[:, 2:4] = half(low[:, None])
        return out

    def nearest(self, x_Gn: Tensor, inverse: Tensor, table: Table) -> Tensor:
        q_Gn = _levels(x_Gn)
        middles, codes = np.array(table.middles, np.float32), np.array(table.codes, np.uint8)
        _call(_nearest, x_Gn, inverse, middles, codes, q_Gn)
        return q_Gn

    def round_away(self, x_Gn: Tensor, inverse: Tensor) -> Tensor:
        q_Gn = _levels(x_Gn).view(torch.int8)
        _call(_round_away, x_Gn, inverse, q_Gn)
        return q_Gn


SEARCHES: Searches = _Cpu()


def _per_group(x_Gn: Tensor) -> Tensor:
    return torch.empty(len(x_Gn))


def _given(weight_Gn: Tensor | None) -> Tensor:
    """An empty tensor says none: so there is one compiled function and not two."""
    return torch.empty(0, 0) if weight_Gn is None else weight_Gn


def _levels(x_Gn: Tensor) -> Tensor:
    return torch.empty(x_Gn.shape, dtype=torch.uint8)


def _call(function: Callable[..., None], *arguments: Any) -> None:
    function(*(a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments))
