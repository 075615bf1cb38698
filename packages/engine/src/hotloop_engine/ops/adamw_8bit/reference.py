"""AdamW on block-wise 8-bit moments in torch, as the equations are written.   arXiv:2110.02861 section 2

See `hotloop_core.kernels.AdamW8bit`.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotloop_core.kernels import AdamWOptions, EightBitTensor
    from torch import Tensor

BLOCK = 256
"""Elements that share an absmax."""


def dequantise(codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """Returns the moments, flat, fp32."""
    values = table[codes.flatten().long()]
    return values * absmax.repeat_interleave(BLOCK)[: values.numel()]


def quantise_(codes: Tensor, absmax: Tensor, table: Tensor, moments: Tensor) -> None:
    """Writes codes and absmax of flat moments; a negative one keeps its sign where the table has one."""
    blocks = pad(moments, (0, -moments.numel() % BLOCK)).view(-1, BLOCK)
    absmax.copy_(blocks.abs().amax(1))
    scaled = blocks / absmax.where(absmax > 0, 1.0)[:, None]
    midpoints = (table[1:] + table[:-1]) / 2
    nearest = torch.bucketize(scaled, midpoints)
    lost_sign = (scaled < 0) & (table[nearest] >= 0)
    nearest = nearest - (lost_sign & (nearest > 0)).long()
    codes.copy_(nearest.flatten()[: moments.numel()].view(codes.shape))


@torch.no_grad()
def update_(
    tensors: Sequence[EightBitTensor], m_table: Tensor, v_table: Tensor, options: AdamWOptions
) -> None:
    """One step of every tensor, in place."""
    beta1, beta2 = options.beta1, options.beta2
    c1, c2 = 1 - beta1**options.step, 1 - beta2**options.step
    for tensor in tensors:
        g, p = tensor.gradient.flatten().float(), tensor.parameter.flatten().float()
        m = beta1 * dequantise(tensor.m_codes, tensor.m_absmax, m_table) + (1 - beta1) * g
        v = beta2 * dequantise(tensor.v_codes, tensor.v_absmax, v_table) + (1 - beta2) * g * g
        finite = g.isfinite()
        m, v = m.where(finite, 0.0), v.where(finite, 0.0)
        step = (options.lr / c1) * m / (v.sqrt() / sqrt(c2) + options.eps)
        new = (1 - options.lr * options.weight_decay) * p - step
        tensor.parameter.copy_(new.where(finite, p).view(tensor.parameter.shape))
        quantise_(tensor.m_codes, tensor.m_absmax, m_table, m)
        quantise_(tensor.v_codes, tensor.v_absmax, v_table, v)
