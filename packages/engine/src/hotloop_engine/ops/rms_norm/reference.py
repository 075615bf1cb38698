"""RMSNorm in torch, as the equation is written.   arXiv:1910.07467 eq. 4

x_TD, residual_TD, dy_TD, y_TD bf16, fp16, fp32 or fp64; w_D any float dtype; rstd_T and dw_D fp32
(fp64 for fp64). See `hotloop_core.kernels.RmsNorm`; the backward is derived in `derivation.md`.
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
    compute = compute_dtype(x_TD)
    s_TD = x_TD
    if residual_TD is not None:
        s_TD = stored(x_TD.to(compute) + residual_TD.to(compute), sum_out, x_TD.dtype)
    s = s_TD.to(compute)
    rstd_T = torch.rsqrt(s.square().mean(-1) + eps)
    y = s * rstd_T[:, None]
    if w_D is not None:
        y = y * (offset + w_D.to(compute))
    return stored(y, out, x_TD.dtype), rstd_T, s_TD


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
    compute = compute_dtype(s_TD)
    dy, x = dy_TD.to(compute), s_TD.to(compute) * rstd_T[:, None]
    g = dy if w_D is None else dy * (offset + w_D.to(compute))
    ds = rstd_T[:, None] * (g - x * (g * x).mean(-1, keepdim=True))
    if dresidual_TD is not None:
        ds = ds + dresidual_TD.to(compute)
    dw_D = (dy * x).sum(0) if need_dw and w_D is not None else None
    return stored(ds, out, s_TD.dtype), dw_D
