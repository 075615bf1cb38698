"""Inverted dropout in Triton: one Philox draw per element (Salmon et al., SC 2011)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotloop_engine.ops.kernel import FUSED, cdiv, wide

BLOCK = 1024  # four 16-bit values a lane with 8 warps; the draw, not the memory, is the cost


@triton.jit
def _dropout(x_ptr, out_ptr, columns, row_stride, elements, p, seed, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < elements
    row = offset // columns
    x = tl.load(x_ptr + row * row_stride + (offset - row * columns), mask=inside)
    keep = tl.rand(seed, offset) >= p
    tl.store(out_ptr + offset, tl.where(keep, wide(x) / (1.0 - p), 0.0), mask=inside)


def forward(x: Tensor, *, p: float, seed: int) -> Tensor:
    """x / (1 - p) where a draw says keep, else 0; [T, K], any row stride. A function of seed and position."""
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        grid = (cdiv(x.numel(), BLOCK),)
        columns = x.shape[-1]
        _dropout[grid](x, out, columns, x.stride(-2), x.numel(), p, seed, BLOCK=BLOCK, **FUSED)
    return out
