"""LayerNorm in Triton: whole rows in registers, every input read once, every output written once.

Equation, shapes and dtypes as in `reference.py`. Reductions in fp32 (fp64 for fp64), the variance
from the centred row and not from a difference of moments. D <= 65,536.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotloop_engine.ops.kernel import FUSED, cdiv, require_unit_last, row_tile, sum_of_parts, wide
from hotloop_engine.ops.rms_norm.kernel import row_shares

FORWARD_ELEMENTS = 32  # of one tensor in a thread: four 16-byte loads of bf16 in flight


@triton.jit
def _forward(
    x_ptr,
    w_ptr,
    b_ptr,
    residual_ptr,
    s_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    T,
    x_stride,
    residual_stride,
    s_stride,
    y_stride,
    EPS: tl.constexpr,
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
    mean = tl.sum(s, axis=1) / D
    centred = tl.where(inside, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + EPS)
    tl.store(mean_ptr + row, mean, mask=row < T)
    tl.store(rstd_ptr + row, rstd, mask=row < T)
    y = centred * rstd[:, None]
    if w_ptr is not None:
        y = y * tl.load(w_ptr + column, mask=column < D, other=0.0).to(y.dtype)
    if b_ptr is not None:
        y = y + tl.load(b_ptr + column, mask=column < D, other=0.0).to(y.dtype)
    at = y_ptr + row[:, None] * y_stride + column
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy_ptr,
    s_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dresidual_ptr,
    ds_ptr,
    dw_ptr,
    db_ptr,
    T,
    tiles,
    dy_stride,
    s_stride,
    dresidual_stride,
    ds_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)[None, :]
    if w_ptr is not None:
        w = wide(tl.load(w_ptr + column, mask=column < D, other=0.0))
    if dw_ptr is not None:
        dw = tl.zeros((ROWS, BLOCK_D), dw_ptr.dtype.element_ty)
    if db_ptr is not None:
        db = tl.zeros((ROWS, BLOCK_D), db_ptr.dtype.element_ty)
    for tile in tl.range(program * tiles, (program + 1) * tiles, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < T)[:, None] & (column < D)
        mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)[:, None]
        s = tl.load(s_ptr + row[:, None] * s_stride + column, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column, mask=inside, other=0.0)
        x = (s.to(rstd.dtype) - mean) * rstd
        dy = dy.to(rstd.dtype)
        g = dy  # zero beyond the row, so that neither mean below needs a mask on x
        if w_ptr is not None:
            g = dy * w.to(rstd.dtype)
        projected = tl.sum(g, axis=1)[:, None] / D + x * (tl.sum(g * x, axis=1)[:, None] / D)
        ds = rstd * (g - projected)
        if dresidual_ptr is not None:
            at = dresidual_ptr + row[:, None] * dresidual_stride + column
            ds += tl.load(at, mask=inside, other=0.0).to(rstd.dtype)
        at = ds_ptr + row[:, None] * ds_stride + column
        tl.store(at, ds.to(ds_ptr.dtype.element_ty), mask=inside)
        if dw_ptr is not None:
            dw += dy * x
        if db_ptr is not None:
            db += dy
    at = program.to(tl.int64) * D + column
    if dw_ptr is not None:
        tl.store(dw_ptr + at, tl.sum(dw, axis=0)[None, :], mask=column < D)
    if db_ptr is not None:
        tl.store(db_ptr + at, tl.sum(db, axis=0)[None, :], mask=column < D)


def forward(
    x_TD: Tensor,
    w_D: Tensor | None,
    b_D: Tensor | None,
    *,
    eps: float,
    residual_TD: Tensor | None = None,
    sum_out: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (y, mean, rstd, s): y = (s - mean) rstd w + b, rstd = (var(s) + eps)^-1/2.

    s = x + residual; mean and (biased) variance over the row.
    """
    T, D = x_TD.shape
    tile = row_tile(D, FORWARD_ELEMENTS)
    compute = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    y_TD = x_TD.new_empty(T, D) if out is None else out
    mean_T = x_TD.new_empty(T, dtype=compute)
    rstd_T = x_TD.new_empty(T, dtype=compute)
    s_TD = x_TD
    if residual_TD is not None:
        s_TD = x_TD.new_empty(T, D) if sum_out is None else sum_out
    require_unit_last(x=x_TD, w=w_D, b=b_D, residual=residual_TD, sum_out=s_TD, out=y_TD)
    if x_TD.numel():
        _forward[(cdiv(T, tile.rows),)](
            x_TD,
            w_D,
            b_D,
            residual_TD,
            s_TD,
            y_TD,
            mean_T,
            rstd_T,
            T,
            x_TD.stride(0),
            0 if residual_TD is None else residual_TD.stride(0),
            s_TD.stride(0),
            y_TD.stride(0),
            EPS=eps,
            D=D,
            BLOCK_D=tile.width,
            ROWS=tile.rows,
            num_warps=tile.warps,
            **FUSED,
        )
    return y_TD, mean_T, rstd_T, s_TD


def backward(
    dy_TD: Tensor,
    s_TD: Tensor,
    w_D: Tensor | None,
    mean_T: Tensor,
    rstd_T: Tensor,
    *,
    dresidual_TD: Tensor | None = None,
    need_dw: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns (ds, dw, db): ds = rstd (g - mean(g) - x mean(g x)) + dresidual.

    g = dy w and x = (s - mean) rstd. dw = sum dy x and db = sum dy, over tokens; both None without
    `need_dw`, dw also without w.
    """
    T, D = s_TD.shape
    shares = row_shares(s_TD, summing=need_dw, inputs=2 + (dresidual_TD is not None))
    ds_TD = s_TD.new_empty(T, D) if out is None else out
    require_unit_last(dy=dy_TD, s=s_TD, w=w_D, dresidual=dresidual_TD, out=ds_TD)
    dw_PD = rstd_T.new_empty(shares.programs, D) if need_dw and w_D is not None else None
    db_PD = rstd_T.new_empty(shares.programs, D) if need_dw else None
    if s_TD.numel():
        _backward[(shares.programs,)](
            dy_TD,
            s_TD,
            w_D,
            mean_T,
            rstd_T,
            dresidual_TD,
            ds_TD,
            dw_PD,
            db_PD,
            T,
            shares.tiles_each,
            dy_TD.stride(0),
            s_TD.stride(0),
            0 if dresidual_TD is None else dresidual_TD.stride(0),
            ds_TD.stride(0),
            D=D,
            BLOCK_D=shares.tile.width,
            ROWS=shares.tile.rows,
            STAGES=shares.stages,
            num_warps=shares.tile.warps,
            **FUSED,
        )
    dw_D = None if dw_PD is None else sum_of_parts(dw_PD)
    return ds_TD, dw_D, None if db_PD is None else sum_of_parts(db_PD)
