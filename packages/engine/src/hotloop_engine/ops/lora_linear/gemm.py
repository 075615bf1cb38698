"""Products that round once, and where gradients gather."""

from __future__ import annotations

import torch
from torch import Tensor

GradientSink = dict[int, Tensor]
"""id of a parameter -> its gradient, added up where a parameter occurs twice."""


def matmul_to(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated in fp32 and rounded once, to `dtype`."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.device.type == "cuda" and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float()).to(dtype)


def gemm(a: Tensor, b: Tensor, out: Tensor, residual: Tensor | None, alpha: float) -> None:
    """out = residual + alpha * a b; a residual of another dtype (fp32 under autocast) is added after the GEMM."""
    if residual is None:
        torch.mm(a, b, out=out)
        if alpha != 1.0:
            out *= alpha
    elif out.dtype == a.dtype:
        torch.addmm(residual, a, b, alpha=alpha, out=out)
    else:
        torch.add(residual, torch.mm(a, b), alpha=alpha, out=out)


def add_gradient(sink: GradientSink, parameter: Tensor, gradient: Tensor) -> None:
    """Adds to what is known of a parameter's gradient, if it wants one."""
    if parameter.requires_grad:
        known = sink.get(id(parameter))
        sink[id(parameter)] = gradient if known is None else known + gradient
