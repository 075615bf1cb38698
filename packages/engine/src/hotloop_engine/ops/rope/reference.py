"""Rotary position embedding in torch, as the equation is written.   arXiv:2104.09864 eq. 34

q_THK, k_TGK and their gradients bf16, fp16, fp32 or fp64; cos_PR, sin_PR and the norm weights any
float dtype; computed in fp32 (fp64 for fp64). See `hotloop_core.kernels.Rope`; the backward is
derived in `derivation.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_engine.ops._tensors import compute_dtype, stored
from hotloop_engine.ops.rms_norm import reference as rms_norm

if TYPE_CHECKING:
    import torch
    from hotloop_core.kernels import HeadNorm
    from torch import Tensor


def forward(
    q_THK: Tensor,
    k_TGK: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    *,
    interleaved: bool = False,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    out_q: Tensor | None = None,
    out_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (q, k): y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, of the normed heads."""

    def one(x_THK: Tensor, norm: HeadNorm | None, out: Tensor | None) -> Tensor:
        compute = compute_dtype(x_THK)
        x = x_THK.to(compute)
        if norm is not None:
            x_NK = x.reshape(-1, x.shape[-1])
            x = rms_norm.forward(x_NK, norm.w_K, eps=norm.eps, offset=norm.offset)[0].view(x.shape)
        tables = _tables(cos_PR, sin_PR, x.shape[0], compute, interleaved)
        return stored(_rotate(x, *tables, interleaved), out, x_THK.dtype)

    return one(q_THK, q_norm, out_q), one(k_TGK, k_norm, out_k)


def backward(
    dq_THK: Tensor,
    dk_TGK: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    *,
    interleaved: bool = False,
    q_THK: Tensor | None = None,
    k_TGK: Tensor | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    need_dw: bool = False,
    out_q: Tensor | None = None,
    out_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns (dq, dk, dwq, dwk): dx1 = dy1 cos1 + dy2 sin2, dx2 = dy2 cos2 - dy1 sin1, then norms.

    cos1 and sin1 are the columns that y1 uses, cos2 and sin2 those of y2.
    """

    def one(
        dy_THK: Tensor, x_THK: Tensor | None, norm: HeadNorm | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        compute = compute_dtype(dy_THK)
        cos1, sin1, cos2, sin2 = _tables(cos_PR, sin_PR, dy_THK.shape[0], compute, interleaved)
        dx = _rotate(dy_THK.to(compute), cos1, -sin2, cos2, -sin1, interleaved)
        dw_K = None
        if norm is not None and x_THK is not None:
            K = x_THK.shape[-1]
            x_NK = x_THK.to(compute).reshape(-1, K)
            rstd_N = (x_NK.square().mean(-1) + norm.eps).rsqrt()
            dx, dw_K = rms_norm.backward(
                dx.view(-1, K), x_NK, norm.w_K, rstd_N, offset=norm.offset, need_dw=need_dw
            )
        return stored(dx.view(dy_THK.shape), out, dy_THK.dtype), dw_K

    dq, dwq_K = one(dq_THK, q_THK, q_norm, out_q)
    dk, dwk_K = one(dk_TGK, k_TGK, k_norm, out_k)
    return dq, dk, dwq_K, dwk_K


def _tables(
    cos_PR: Tensor, sin_PR: Tensor, T: int, dtype: torch.dtype, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cos1, sin1, cos2, sin2, each [T, 1, R/2]: those of y1 and those of y2, for every token."""
    P, R = cos_PR.shape
    cos1, cos2 = cos_PR.to(dtype).repeat(T // max(P, 1), 1)[:, None].split(R // 2, dim=-1)
    sin1, sin2 = sin_PR.to(dtype).repeat(T // max(P, 1), 1)[:, None].split(R // 2, dim=-1)
    return (cos1, sin1, cos1, sin1) if interleaved else (cos1, sin1, cos2, sin2)


def _rotate(
    x: Tensor, cos1: Tensor, sin1: Tensor, cos2: Tensor, sin2: Tensor, interleaved: bool
) -> Tensor:
    R = 2 * cos1.shape[-1]
    one, two = (
        (slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(R // 2), slice(R // 2, R))
    )
    y = x.clone()
    y[..., one] = x[..., one] * cos1 - x[..., two] * sin1
    y[..., two] = x[..., two] * cos2 + x[..., one] * sin2
    return y
