"""RMSNorm, with the residual add fused, as a differentiable op.   arXiv:1910.07467 eq. 4"""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from hotloop_core.errors import ConfigError
from torch.autograd.function import once_differentiable

from hotloop_engine.ops._select import implementation
from hotloop_engine.ops._tensors import rows

if TYPE_CHECKING:
    from torch import Tensor


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, residual, eps, offset, impl):
        op = implementation("rms_norm", x.device, impl)
        residual_TD = None if residual is None else rows(residual)
        y_TD, rstd_T, s_TD = op.forward(rows(x), w, eps=eps, offset=offset, residual_TD=residual_TD)
        y = y_TD.view(x.shape)
        s = x if residual is None else s_TD.view(x.shape)
        ctx.save_for_backward(s, w, rstd_T)
        ctx.op, ctx.offset = op, offset
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds_later=None):
        s, w, rstd_T = ctx.saved_tensors
        dw = None
        if dy is None:
            ds = ds_later
        else:
            ds, dw = ctx.op.backward(
                rows(dy),
                rows(s),
                w,
                rstd_T,
                offset=ctx.offset,
                dresidual_TD=None if ds_later is None else rows(ds_later),
                need_dw=ctx.needs_input_grad[1],
            )
            ds = ds.view(s.shape)
        dresidual = None
        if ctx.needs_input_grad[2] and ds is not None:
            dresidual = ds.to(ctx.residual_dtype)
        return ds, None if dw is None else dw.to(w.dtype), dresidual, None, None, None


@overload
def rms_norm(
    x: Tensor,
    w: Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    residual: None = None,
    impl: str | None = None,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    w: Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    residual: Tensor,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    w: Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises: y = s / sqrt(mean(s^2) + eps) * (offset + w), where s = x + residual, or x.

    Computed in fp32 (fp64 for fp64) and rounded once. Backward recomputes the normed input from s.

    Args:
        x: [..., D], bf16, fp16, fp32 or fp64.
        w: [D], any float dtype; None does not scale.
        eps: added to the mean square, not to its root.
        offset: 0 for Llama, 1 for Gemma.
        residual: [..., D], added to x before the norm, rounded to x's dtype.
        impl: "triton", "reference" or a registered name; None lets the device decide.

    Returns:
        y [..., D] in x's dtype; with a residual (y, s).

    Raises:
        ConfigError: shapes that do not fit each other.
        NoImplementationError: `impl` cannot run on x's device.

    Example:
        >>> import torch
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0) * 12.5**0.5
        tensor([[3., 4.]])

    """
    if w is not None and w.shape != x.shape[-1:]:
        raise ConfigError(f"rms_norm: w has shape {tuple(w.shape)}, x ends in {x.shape[-1]}.")
    if residual is not None and residual.shape != x.shape:
        raise ConfigError(
            f"rms_norm: residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}; "
            "they must be equal."
        )
    return _RmsNorm.apply(x, w, residual, eps, offset, impl)
