"""LayerNorm in torch, as the equation is written.   arXiv:1607.06450 eq. 4

x_TD, residual_TD, dy_TD, y_TD bf16, fp16, fp32 or fp64; w_D, b_D any float dtype; mean_T, rstd_T,
dw_D, db_D fp32 (fp64 for fp64). See `hotloop_core.kernels.LayerNorm`; the backward is derived in
`derivation.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hotloop_engine.ops._tensors import compute_dtype, stored

if TYPE_CHECKING:
    from torch import Tensor


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
    compute = compute_dtype(x_TD)
    s_TD = x_TD
    if residual_TD is not None:
        s_TD = stored(x_TD.to(compute) + residual_TD.to(compute), sum_out, x_TD.dtype)
    s = s_TD.to(compute)
    mean_T = s.mean(-1)
    centred = s - mean_T[:, None]
    rstd_T = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd_T[:, None]
    if w_D is not None:
        y = y * w_D.to(compute)
    if b_D is not None:
        y = y + b_D.to(compute)
    return stored(y, out, x_TD.dtype), mean_T, rstd_T, s_TD


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
    compute = compute_dtype(s_TD)
    dy = dy_TD.to(compute)
    x = (s_TD.to(compute) - mean_T[:, None]) * rstd_T[:, None]
    g = dy if w_D is None else dy * w_D.to(compute)
    projected = g.mean(-1, keepdim=True) + x * (g * x).mean(-1, keepdim=True)
    ds = rstd_T[:, None] * (g - projected)
    if dresidual_TD is not None:
        ds = ds + dresidual_TD.to(compute)
    dw_D = (dy * x).sum(0) if need_dw and w_D is not None else None
    db_D = dy.sum(0) if need_dw else None
    return stored(ds, out, s_TD.dtype), dw_D, db_D
