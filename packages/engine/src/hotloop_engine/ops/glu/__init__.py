"""Gated linear units (SwiGLU, GeGLU) as a differentiable op.   arXiv:2002.05202 section 2"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch
from hotloop_core import kernels
from hotloop_core.errors import ConfigError
from torch.autograd.function import once_differentiable

from hotloop_engine.ops._select import implementation
from hotloop_engine.ops._tensors import rows

if TYPE_CHECKING:
    from hotloop_core.kernels import Activation
    from torch import Tensor


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, activation, impl):
        ctx.save_for_backward(gate, up)
        ctx.op, ctx.activation = implementation("glu", gate.device, impl), activation
        h_TI = ctx.op.forward(rows(gate), rows(up), activation=activation)
        return h_TI.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        # The op overwrites all three, and none of them is ours to overwrite.
        dh_TI, dgate_TI, dup_TI = (
            rows(tensor).clone(memory_format=torch.contiguous_format) for tensor in (dh, gate, up)
        )
        ctx.op.backward_(dh_TI, dgate_TI, dup_TI, activation=ctx.activation)
        return dgate_TI.view(gate.shape), dup_TI.view(up.shape), None, None


def glu(gate: Tensor, up: Tensor, *, activation: Activation, impl: str | None = None) -> Tensor:
    """Gates: h = act(gate) * up, computed in fp32 (fp64 for fp64) and rounded once.

    Backward copies gate, up and dh, which the op itself overwrites; a block that owns them calls
    the implementation's `backward_` instead.

    Args:
        gate: [..., I], bf16, fp16, fp32 or fp64.
        up: like gate.
        activation: "silu" (SwiGLU), "gelu" (GeGLU, exact) or "gelu_tanh" (its tanh approximation).
        impl: "triton", "reference" or a registered name; None lets the device decide.

    Returns:
        h [..., I] in gate's dtype.

    Raises:
        ConfigError: shapes that differ, or an unknown activation.
        NoImplementationError: `impl` cannot run on gate's device.

    Example:
        >>> import torch
        >>> glu(torch.zeros(1, 2), torch.ones(1, 2), activation="silu")
        tensor([[0., 0.]])

    """
    known = get_args(kernels.Activation)
    if activation not in known:
        raise ConfigError(f"glu: unknown activation {activation!r}; known: {', '.join(known)}.")
    if gate.shape != up.shape:
        raise ConfigError(
            f"glu: gate has shape {tuple(gate.shape)}, up {tuple(up.shape)}; they must be equal."
        )
    return _Glu.apply(gate, up, activation, impl)
