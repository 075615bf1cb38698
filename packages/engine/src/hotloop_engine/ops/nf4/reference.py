"""4-bit dequantisation in torch, as arXiv:2305.14314 section 3 writes it. Runs on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hotloop_core.kernels import FourBitWeight
    from torch import Tensor


def absmax_of(weight: FourBitWeight) -> Tensor:
    """The scale of each block, fp32 [ceil(N*K / blocksize)], with the nesting undone."""
    if weight.nested_absmax is None:
        return weight.absmax
    assert weight.nested_code is not None and weight.nested_offset is not None
    outer = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)
    inner = weight.nested_code[weight.absmax.int()]
    return inner * outer[: inner.numel()] + weight.nested_offset


def forward(weight: FourBitWeight, *, out: Tensor) -> Tensor:
    """W[n, k] = code[packed] * absmax[block], in fp32, rounded once into `out` (N, K)."""
    packed = weight.packed.flatten()
    codes = torch.stack((packed >> 4, packed & 0xF), dim=-1).flatten()[: out.numel()]
    scales = absmax_of(weight).repeat_interleave(weight.blocksize)[: out.numel()]
    return out.copy_((weight.code[codes.int()] * scales).view(weight.shape))
