"""LayerNorm, with the residual add fused, as a differentiable op.   arXiv:1607.06450 eq. 4"""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import torch
from hotloop_core.errors import ConfigError
from torch.autograd.function import once_differentiable

from hotloop_engine.ops._select import implementation
from hotloop_engine.ops._tensors import rows

if TYPE_CHECKING:
    from torch import Tensor


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, residual, eps, impl):
        op = implementation("layer_norm", x.device, impl)
        residual_TD = None if residual is None else rows(residual)
        y_TD, mean_T, rstd_T, s_TD = op.forward(rows(x), w, b, eps=eps, residual_TD=residual_TD)
        y = y_TD.view(x.shape)
        s = x if residual is None else s_TD.view(x.shape)
        ctx.save_for_backward(s, w, mean_T, rstd_T)
        ctx.op = op
        ctx.b_dtype = None if b is None else b.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds_later=None):
        s, w, mean_T, rstd_T = ctx.saved_tensors
        need_w, need_b, need_residual = ctx.needs_input_grad[1:4]
        ds, dw, db, dresidual = ds_later, None, None, None
        if dy is not None:
            ds, dw, db = ctx.op.backward(
                rows(dy),
                rows(s),
                w,
                mean_T,
                rstd_T,
                dresidual_TD=None if ds_later is None else rows(ds_later),
                need_dw=need_w or need_b,
            )
            ds = ds.view(s.shape)
            dw = dw.to(w.dtype) if need_w else None
            db = db.to(ctx.b_dtype) if need_b else None
        if need_residual and ds is not None:
            dresidual = ds.to(ctx.residual_dtype)
        return ds, dw, db, dresidual, None, None


@overload
def layer_norm(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    *,
    eps: float,
    residual: None = None,
    impl: str | None = None,
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    *,
    eps: float,
    residual: Tensor,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    *,
    eps: float,
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises: y = (s - mean(s)) / sqrt(var(s) + eps) * w + b, where s = x + residual, or x.

    The variance is the biased one. Computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        x: [..., D], bf16, fp16, fp32 or fp64.
        w: [D], any float dtype; None does not scale.
        b: [D], any float dtype; None does not shift.
        eps: added to the variance.
        residual: [..., D], added to x before the norm, rounded to x's dtype.
        impl: "triton", "reference" or a registered name; None lets the device decide.

    Returns:
        y [..., D] in x's dtype; with a residual (y, s).

    Raises:
        ConfigError: shapes that do not fit each other.
        NoImplementationError: `impl` cannot run on x's device.

    Example:
        >>> import torch
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), None, None, eps=0.0)
        tensor([[-1.,  1.]])

    """
    for name, parameter in (("w", w), ("b", b)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ConfigError(
                f"layer_norm: {name} has shape {tuple(parameter.shape)}, x ends in {x.shape[-1]}."
            )
    if residual is not None and residual.shape != x.shape:
        raise ConfigError(
            f"layer_norm: residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}; "
            "they must be equal."
        )
    return _LayerNorm.apply(x, w, b, residual, eps, impl)
