"""What the rest of the engine calls for a matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from .chosen import product


def gemm(
    a: Tensor, b: Tensor, out: Tensor, residual: Tensor | None = None, alpha: float = 1.0
) -> None:
    """out [M, N] = residual + alpha * a [M, K] b [K, N], rounded once.

    `residual` may be `out` itself; then, and where it is of another dtype than the product (fp32 under autocast), the
    product is rounded before it is added, as in eager.
    """
    tracked = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if out.is_cuda and not tracked and product(a, b, out, residual, alpha):
        return
    if residual is None:
        torch.mm(a, b, out=out)
        if alpha != 1.0:
            out *= alpha
    elif out.dtype == a.dtype:
        torch.addmm(residual, a, b, alpha=alpha, out=out)
    else:
        made = torch.empty(out.shape, dtype=a.dtype, device=a.device)
        gemm(a, b, made)
        torch.add(residual, made, alpha=alpha, out=out)


def matmul_to(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated in fp32 and rounded once, to `dtype`."""
    if a.dtype == dtype:
        out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
        gemm(a, b, out)
        return out
    if a.device.type == "cuda" and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float()).to(dtype)
