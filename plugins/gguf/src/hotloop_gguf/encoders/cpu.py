"""`Searches` on a CPU: the loops of `lanes` and those that need no lanes, compiled by numba."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import lanes
from .lanes import clamp, compiled, round_even

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .searches import Grid, Searches, Table

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_ROUND = np.float32(1.5 * 2**23)


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
def _truncate(x: Any, low: Any, inverse: Any, shift: Any, levels: Any, q: Any) -> None:
    for g in range(len(x)):
        for j in range(x.shape[1]):
            scaled = (x[g, j] - low[g]) * inverse[g] + shift
            q[g, j] = np.uint8(clamp(scaled, _ZERO, levels))


@compiled
def _round_away(x: Any, inverse: Any, q: Any) -> None:
    for g in range(len(x)):
        for j in range(x.shape[1]):
            scaled = x[g, j] * inverse[g]
            whole = np.float32(np.int32(scaled))
            off = scaled - whole
            more = _ONE if off >= _HALF else (-_ONE if off <= -_HALF else _ZERO)
            q[g, j] = np.int8(whole + more)


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
    def bounds(self, x_Gn: Tensor) -> tuple[Tensor, Tensor]:
        low, high = _per_group(x_Gn), _per_group(x_Gn)
        _call(lanes.bounds, x_Gn, low, high)
        return low, high

    def extreme(self, x_Gn: Tensor) -> Tensor:
        out = _per_group(x_Gn)
        _call(lanes.extremes, x_Gn, out)
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

    def truncate(
        self, x_Gn: Tensor, low: Tensor, inverse: Tensor, shift: float, levels: int
    ) -> Tensor:
        q_Gn = _levels(x_Gn)
        _call(_truncate, x_Gn, low, inverse, np.float32(shift), np.float32(levels), q_Gn)
        return q_Gn

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
