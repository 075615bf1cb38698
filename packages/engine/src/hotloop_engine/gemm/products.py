"""What the rest of the engine calls for a matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from .chosen import product


def gemm(
    a: Tensor, b: Tensor, out: Tensor, residual: Tensor | None = None, alpha: float = 1.0
) -> None:
    """out [M, N] = residual + alpha * a [M, K] b [K, N]; `residual` may be `out` itself.

    A residual of another dtype than the product's (fp32 under autocast) is added after it.
    """
    if out.is_cuda and product(a, b, out, residual, alpha):
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
