"""RMSNorm in Triton: whole rows in registers, every input read once, every output written once.

Equation, shapes and dtypes as in `reference.py`. Reductions in fp32 (fp64 for fp64). D <= 65,536.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotloop_engine.ops._ahead import stages_ahead
from hotloop_engine.ops.kernel import (
    RowTile,
    cdiv,
    launch,
    multiprocessors,
    require_unit_last,
    row_tile,
    sum_of_parts,
    wide,
)

# Elements of one tensor that a thread holds: 32 are four 16-byte loads of bf16 in flight. A second
# input leaves registers for half as many. With the weight gradient's sums, 8 are 54 registers (16
# were 121), so that 32 warps share a multiprocessor; the loads in flight are in shared memory then.
FORWARD_ELEMENTS = 32
BACKWARD_ELEMENTS = 16
SUMMING_ELEMENTS = 8
WARPS_RESIDENT = 32  # on a multiprocessor, at 64 registers a thread


@triton.jit
def _forward(
    x_ptr,
    w_ptr,
    residual_ptr,
    s_ptr,
    y_ptr,
    rstd_ptr,
    T,
    x_stride,
    residual_stride,
    s_stride,
    y_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # T * D can pass 2**31
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < T)[:, None] & (column < D)
    s = wide(tl.load(x_ptr + row[:, None] * x_stride + column, mask=inside, other=0.0))
    if residual_ptr is not None:
        at = residual_ptr + row[:, None] * residual_stride + column
        # The stream is rounded to its dtype first, and the norm is of what was stored.
        rounded = (s + tl.load(at, mask=inside, other=0.0).to(s.dtype)).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + row[:, None] * s_stride + column, rounded, mask=inside)
        s = wide(rounded)
    rstd = tl.rsqrt(tl.sum(s * s, axis=1) / D + EPS)
    tl.store(rstd_ptr + row, rstd, mask=row < T)
    y = s * rstd[:, None]
    if w_ptr is not None:
        y = y * (OFFSET + tl.load(w_ptr + column, mask=column < D, other=0.0).to(y.dtype))
    at = y_ptr + row[:, None] * y_stride + column
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy_ptr,
    s_ptr,
    w_ptr,
    rstd_ptr,
    dresidual_ptr,
    ds_ptr,
    dw_ptr,
    T,
    tiles,
    dy_stride,
    s_stride,
    dresidual_stride,
    ds_stride,
    OFFSET: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)[None, :]
    if w_ptr is not None:
        w = OFFSET + wide(tl.load(w_ptr + column, mask=column < D, other=0.0))
    if dw_ptr is not None:
        dw = tl.zeros((ROWS, BLOCK_D), dw_ptr.dtype.element_ty)
    for tile in tl.range(program * tiles, (program + 1) * tiles, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < T)[:, None] & (column < D)
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)[:, None]
        s = tl.load(s_ptr + row[:, None] * s_stride + column, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column, mask=inside, other=0.0)
        x = s.to(rstd.dtype) * rstd
        dy = dy.to(rstd.dtype)
        g = dy
        if w_ptr is not None:
            g = dy * w.to(rstd.dtype)
        ds = rstd * (g - x * (tl.sum(g * x, axis=1)[:, None] / D))
        if dresidual_ptr is not None:
            at = dresidual_ptr + row[:, None] * dresidual_stride + column
            ds += tl.load(at, mask=inside, other=0.0).to(rstd.dtype)
        at = ds_ptr + row[:, None] * ds_stride + column
        tl.store(at, ds.to(ds_ptr.dtype.element_ty), mask=inside)
        if dw_ptr is not None:
            dw += dy * x
    if dw_ptr is not None:
        at = dw_ptr + program.to(tl.int64) * D + column
        tl.store(at, tl.sum(dw, axis=0)[None, :], mask=column < D)


def forward(
    x_TD: Tensor,
    w_D: Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    residual_TD: Tensor | None = None,
    sum_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (y, rstd, s): y = s rstd (offset + w), rstd = (mean(s^2) + eps)^-1/2.

    s = x + residual, or x.
    """
    T, D = x_TD.shape
    tile = row_tile(D, FORWARD_ELEMENTS)
    compute = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    y_TD = x_TD.new_empty(T, D) if out is None else out
    rstd_T = x_TD.new_empty(T, dtype=compute)
    s_TD = x_TD
    if residual_TD is not None:
        s_TD = x_TD.new_empty(T, D) if sum_out is None else sum_out
    require_unit_last(x=x_TD, w=w_D, residual=residual_TD, sum_out=s_TD, out=y_TD)
    if x_TD.numel():
        launch(
            _forward,
            cdiv(T, tile.rows),
            (
                x_TD,
                w_D,
                residual_TD,
                s_TD,
                y_TD,
                rstd_T,
                T,
                x_TD.stride(0),
                0 if residual_TD is None else residual_TD.stride(0),
                s_TD.stride(0),
                y_TD.stride(0),
            ),
            {
                "EPS": eps,
                "OFFSET": offset,
                "D": D,
                "BLOCK_D": tile.width,
                "ROWS": tile.rows,
            },
            num_warps=tile.warps,
        )
    return y_TD, rstd_T, s_TD


class RowShares(NamedTuple):
    """How a backward over rows is shared out: the tile, the programs, their tiles, their stages."""

    tile: RowTile
    programs: int
    tiles_each: int
    stages: int


def row_shares(s_TD: Tensor, *, summing: bool, inputs: int) -> RowShares:
    """The launch of a norm's backward that reads `inputs` tensors like s.

    Without sums over tokens, a program for each tile. With them, one for each place on the card (a
    partial sum each, which is written and read again), and eight tiles each at the least.
    """
    T, D = s_TD.shape
    tile = row_tile(D, SUMMING_ELEMENTS if summing else BACKWARD_ELEMENTS)
    tiles = cdiv(T, tile.rows)
    if not summing or not tiles:
        return RowShares(tile, tiles, 1, 1)
    places = multiprocessors(s_TD.device) * (WARPS_RESIDENT // tile.warps)
    tiles_each = cdiv(tiles, max(1, min(places, tiles // 8)))
    stages = stages_ahead(inputs * tile.rows * tile.width * s_TD.element_size())
    return RowShares(tile, cdiv(tiles, tiles_each), tiles_each, stages)


def backward(
    dy_TD: Tensor,
    s_TD: Tensor,
    w_D: Tensor | None,
    rstd_T: Tensor,
    *,
    offset: float = 0.0,
    dresidual_TD: Tensor | None = None,
    need_dw: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns (ds, dw): ds = rstd (g - x mean(g x)) + dresidual, dw = sum over tokens of dy x.

    g = dy (offset + w) and x = s rstd.
    """
    T, D = s_TD.shape
    summing = need_dw and w_D is not None
    shares = row_shares(s_TD, summing=summing, inputs=2 + (dresidual_TD is not None))
    ds_TD = s_TD.new_empty(T, D) if out is None else out
    require_unit_last(dy=dy_TD, s=s_TD, w=w_D, dresidual=dresidual_TD, out=ds_TD)
    dw_PD = rstd_T.new_empty(shares.programs, D) if summing else None
    if s_TD.numel():
        launch(
            _backward,
            shares.programs,
            (
                dy_TD,
                s_TD,
                w_D,
                rstd_T,
                dresidual_TD,
                ds_TD,
                dw_PD,
                T,
                shares.tiles_each,
                dy_TD.stride(0),
                s_TD.stride(0),
                0 if dresidual_TD is None else dresidual_TD.stride(0),
                ds_TD.stride(0),
            ),
            {
                "OFFSET": offset,
                "D": D,
                "BLOCK_D": shares.tile.width,
                "ROWS": shares.tile.rows,
                "STAGES": shares.stages,
            },
            num_warps=shares.tile.warps,
        )
    return ds_TD, None if dw_PD is None else sum_of_parts(dw_PD)
