"""Gated linear units in torch, as the equations are written.   arXiv:2002.05202 section 2

gate_TI, up_TI, dh_TI, h_TI bf16, fp16, fp32 or fp64; computed in fp32 (fp64 for fp64). See
`hotloop_core.kernels.Glu`; the derivatives are derived in `derivation.md`.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import TYPE_CHECKING

import torch

from hotloop_engine.ops._tensors import compute_dtype, stored

if TYPE_CHECKING:
    from hotloop_core.kernels import Activation
    from torch import Tensor


def activate(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Returns act(x) = x p and act'(x) = p + x p'.

    silu: p = sigmoid(x), arXiv:1702.03118. gelu: p = Phi(x), arXiv:1606.08415 section 2.
    gelu_tanh, same paper: p = (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
    """
    if activation == "silu":
        p = torch.sigmoid(x)
        slope = p * (1 - p)
    elif activation == "gelu":
        p = 0.5 * (1 + torch.erf(x / sqrt(2)))
        slope = torch.exp(-0.5 * x * x) / sqrt(2 * pi)
    else:
        p = torch.sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3))
        slope = p * (1 - p) * 2 * sqrt(2 / pi) * (1 + 3 * 0.044715 * x * x)
    return x * p, p + x * slope


def forward(
    gate_TI: Tensor, up_TI: Tensor, *, activation: Activation, out: Tensor | None = None
) -> Tensor:
    """Returns h = act(gate) up."""
    compute = compute_dtype(gate_TI)
    activated, _ = activate(gate_TI.to(compute), activation)
    return stored(activated * up_TI.to(compute), out, gate_TI.dtype)


def backward_(dh_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, *, activation: Activation) -> None:
    """In place: gate becomes dh up act'(gate), up becomes dh act(gate), dh becomes act(gate) up."""
    compute = compute_dtype(gate_TI)
    dh, up = dh_TI.to(compute), up_TI.to(compute)
    activated, derivative = activate(gate_TI.to(compute), activation)
    h, dgate, dup = activated * up, dh * up * derivative, dh * activated
    dh_TI.copy_(h)
    gate_TI.copy_(dgate)
    up_TI.copy_(dup)
