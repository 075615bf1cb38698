"""`Searches` on a GPU: the searches in Triton, rounding in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .parts import constant, even_block, inverse

if TYPE_CHECKING:
    from torch import Tensor

    from .searches import Grid, Searches, Table


class _Gpu:
    def largest(self, x_Gn: Tensor) -> Tensor:
        return x_Gn.abs().amax(1)

    def sums(self, x_Gn: Tensor) -> Tensor:
        total = _per_group(x_Gn)
        _launch("sums", len(x_Gn), _columns(x_Gn), total, len(x_Gn), x_Gn.shape[1])
        return total

    def root(self, x: Tensor) -> Tensor:
        return x.sqrt()

    def affine(
        self, x_Gn: Tensor, weight_Gn: Tensor | None, grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, low = _per_group(x_Gn), _per_group(x_Gn)
        x, w, q = _columns(x_Gn), _columns(weight_Gn), _levels(x_Gn, torch.uint8)
        numbers = (len(x_Gn), float(grid.levels), grid.first, grid.step, grid.steps)
        flags = {"N": x_Gn.shape[1], "GIVEN": w is not None, "ABSOLUTE": grid.absolute}
        _launch("affine", len(x_Gn), x, w, scale, low, q, *numbers, **flags)
        return scale, low, q.T.contiguous()

    def symmetric(
        self, x_Gn: Tensor, weight_Gn: Tensor | None, limit: int
    ) -> tuple[Tensor, Tensor]:
        return _symmetric(x_Gn, weight_Gn, limit, descend=False)

    def descent(self, x_Gn: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        return _symmetric(x_Gn, None, limit, descend=True)

    def positive(self, x_Gn: Tensor, weight_Gn: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        scale, q = _per_group(x_Gn), _levels(x_Gn, torch.float32)
        x, w = _columns(x_Gn), _columns(weight_Gn)
        numbers = (len(x_Gn), float(levels))
        _launch("positive", len(x_Gn), x, w, scale, q, *numbers, N=x_Gn.shape[1])
        return scale, q.T.to(torch.uint8, memory_format=torch.contiguous_format)

    def table(self, x_Gn: Tensor, weight_Gn: Tensor | None) -> Tensor:
        scale, x, w = _per_group(x_Gn), _columns(x_Gn), _columns(weight_Gn)
        flags = {"N": x_Gn.shape[1], "GIVEN": w is not None}
        _launch("table", len(x_Gn), x, w, scale, len(x_Gn), **flags)
        return scale

    def round_affine(
        self, x_Gn: Tensor, scale: Tensor, low: Tensor, levels: int, q_Gn: Tensor
    ) -> None:
        level = (x_Gn + low[:, None]).div_(scale[:, None]).round_().clamp_(0, levels)
        q_Gn.copy_(torch.where(scale[:, None] != 0, level.to(torch.uint8), q_Gn))

    def round_symmetric(self, x_Gn: Tensor, scale: Tensor, limit: int, q_Gn: Tensor) -> None:
        level = (x_Gn / scale[:, None]).round_().clamp_(-limit, limit - 1).add_(limit)
        q_Gn.copy_(torch.where(scale[:, None] != 0, level.to(torch.uint8), q_Gn))

    def even(self, x_Gn: Tensor, levels: int, *, offset: bool) -> Tensor:
        limit = (levels + 1) // 2
        if offset:
            low, high = x_Gn.aminmax(dim=1, keepdim=True)
            scale = (high - low) / constant(levels, x_Gn)
            scaled = (x_Gn - low) * inverse(scale) + 0.5
        else:
            low = None
            scale = x_Gn.gather(1, x_Gn.abs().argmax(1, keepdim=True)) / -limit
            scaled = x_Gn * inverse(scale) + (limit + 0.5)
        return even_block(scale, low, scaled.clamp_(0, levels).to(torch.uint8), levels)

    def nearest(self, x_Gn: Tensor, inverse: Tensor, table: Table) -> Tensor:
        middles = torch.tensor(table.middles, device=x_Gn.device)
        codes = torch.tensor(table.codes, device=x_Gn.device, dtype=torch.uint8)
        return codes[torch.bucketize(x_Gn * inverse[:, None], middles, right=True, out_int32=True)]

    def round_away(self, x_Gn: Tensor, inverse: Tensor) -> Tensor:
        scaled = x_Gn * inverse[:, None]
        whole = scaled.trunc()
        return (whole + ((scaled - whole) * 2).trunc_()).to(torch.int8)


SEARCHES: Searches = _Gpu()


def _symmetric(
    x_Gn: Tensor, weight_Gn: Tensor | None, limit: int, *, descend: bool
) -> tuple[Tensor, Tensor]:
    scale, q = _per_group(x_Gn), _levels(x_Gn, torch.float32)
    x, w = _columns(x_Gn), _columns(weight_Gn)
    flags = {"N": x_Gn.shape[1], "GIVEN": w is not None, "DESCEND": descend}
    _launch("symmetric", len(x_Gn), x, w, scale, q, len(x_Gn), float(limit), **flags)
    return scale, q.T.to(torch.uint8, memory_format=torch.contiguous_format)


def _per_group(x_Gn: Tensor) -> Tensor:
    return torch.empty(len(x_Gn), device=x_Gn.device)


def _columns(x_Gn: Tensor | None) -> Tensor | None:
    return None if x_Gn is None else x_Gn.T.contiguous()


def _levels(x_Gn: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x_Gn.shape[::-1], device=x_Gn.device, dtype=dtype)


def _launch(name: str, groups: int, *arguments: Any, **constants: Any) -> None:
    from . import kernel

    programs = (-(-groups // kernel.THREADS),)
    function = getattr(kernel, name)[programs]
    # One thread to a group: then each reads what it wrote itself, and needs no barrier.
    warps = kernel.THREADS // 32
    constants["THREADS"] = kernel.THREADS
    function(*arguments, **constants, num_warps=warps, enable_fp_fusion=False)
