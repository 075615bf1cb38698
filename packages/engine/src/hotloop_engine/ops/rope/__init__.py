"""Rotary position embedding of q and k, heads normed first where asked, as a differentiable op.

arXiv:2104.09864 eq. 34
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import ConfigError
from torch.autograd.function import once_differentiable

from hotloop_engine.ops._select import implementation
from hotloop_engine.ops._tensors import unit_last

if TYPE_CHECKING:
    from hotloop_core.kernels import HeadNorm
    from torch import Tensor


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, wq, wk, interleaved, q_norm, k_norm, impl):
        # wq and wk are the norms' own weights, passed by themselves so that autograd sees them.
        q_THK, k_TGK = _heads(q), _heads(k)
        cos_PR, sin_PR = _table(cos), _table(sin)
        ctx.op, ctx.interleaved = implementation("rope", q.device, impl), interleaved
        q_out, k_out = ctx.op.forward(
            q_THK,
            k_TGK,
            cos_PR,
            sin_PR,
            interleaved=interleaved,
            q_norm=q_norm,
            k_norm=k_norm,
        )
        ctx.q_norm, ctx.k_norm = _without_weight(q_norm), _without_weight(k_norm)
        ctx.save_for_backward(
            cos_PR,
            sin_PR,
            q if q_norm is not None else None,
            k if k_norm is not None else None,
            wq,
            wk,
        )
        return q_out.view(q.shape), k_out.view(k.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos_PR, sin_PR, q, k, wq, wk = ctx.saved_tensors
        dq_THK, dk_TGK, dwq, dwk = ctx.op.backward(
            _heads(dq),
            _heads(dk),
            cos_PR,
            sin_PR,
            interleaved=ctx.interleaved,
            q_THK=None if q is None else _heads(q),
            k_TGK=None if k is None else _heads(k),
            q_norm=None if ctx.q_norm is None else replace(ctx.q_norm, w_K=wq),
            k_norm=None if ctx.k_norm is None else replace(ctx.k_norm, w_K=wk),
            need_dw=ctx.needs_input_grad[4] or ctx.needs_input_grad[5],
        )
        return (
            dq_THK.view(dq.shape),
            dk_TGK.view(dk.shape),
            None,
            None,
            dwq.to(wq.dtype) if ctx.needs_input_grad[4] else None,
            dwk.to(wk.dtype) if ctx.needs_input_grad[5] else None,
            *(None,) * 4,
        )


def _heads(x: Tensor) -> Tensor:
    """Returns x as [tokens, heads, head size], a view wherever its strides allow one."""
    return unit_last(x.reshape(x.shape[:-2].numel(), *x.shape[-2:]))


def _table(x: Tensor) -> Tensor:
    return unit_last(x.reshape(x.shape[:-1].numel(), x.shape[-1]))


def _without_weight(norm: HeadNorm | None) -> HeadNorm | None:
    return None if norm is None else replace(norm, w_K=None)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotates the first R dimensions of each head: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin.

    Computed in fp32 (fp64 for fp64) and rounded once, the norms included.

    Args:
        q: [..., H, K], bf16, fp16, fp32 or fp64.
        k: [..., G, K], the same leading dimensions and dtype.
        cos: [..., R], any float dtype; R even, 2 to K. Its leading dimensions are q's, or the
            last of q's, or those with ones in front: then its rows repeat. Any positions will do.
        sin: like cos.
        interleaved: pairs are neighbours (x[2j], x[2j+1]) and use column j of the tables, not the
            two halves (x[j], x[j + R/2]) with columns j and j + R/2, as in transformers' Llama.
        q_norm: an RMSNorm over each head of q before the rotation; its weight gets a gradient.
        k_norm: the same for k.
        impl: "triton", "reference" or a registered name; None lets the device decide.

    Returns:
        (q, k), rotated, in new memory.

    Raises:
        ConfigError: shapes that do not fit each other, or tables that require a gradient.
        NoImplementationError: `impl` cannot run on q's device.

    Example:
        >>> import torch
        >>> quarter_turn = torch.zeros(1, 2), torch.ones(1, 2)
        >>> q, _ = rope(torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 2), *quarter_turn)
        >>> q
        tensor([[[0., 1.]]])

    """
    R, K = cos.shape[-1], q.shape[-1]
    tokens, places = q.shape[:-2].numel(), cos.shape[:-1].numel()
    if k.shape != (*q.shape[:-2], k.shape[-2], K) or sin.shape != cos.shape:
        raise ConfigError(
            f"rope: q {tuple(q.shape)} and k {tuple(k.shape)} may differ in heads only, and cos "
            f"{tuple(cos.shape)} and sin {tuple(sin.shape)} not at all."
        )
    if R % 2 or not 2 <= R <= K or tokens % max(places, 1):
        raise ConfigError(
            f"rope: tables of {places} rows and {R} columns do not fit {tokens} tokens, heads of "
            f"{K}; expected an even number of columns, 2 to {K}, and rows that divide the tokens."
        )
    if cos.requires_grad or sin.requires_grad:
        raise ConfigError("rope: cos or sin requires a gradient, which it has none for; detach it.")
    wq = None if q_norm is None else q_norm.w_K
    wk = None if k_norm is None else k_norm.w_K
    return _Rope.apply(q, k, cos, sin, wq, wk, interleaved, q_norm, k_norm, impl)
