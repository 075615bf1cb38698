"""AdamW on 8-bit moments in Triton: every tensor of an optimizer in one launch.

A LoRA of an 8B has 448 tensors of 16 to 230 thousand elements: a launch each is 20 to 50 ms of host time for 0.2 ms of
memory traffic. Here a program owns a few blocks of one tensor and finds its addresses in a table.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hotloop_engine.ops.kernel import launch

from .reference import BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotloop_core.kernels import AdamWOptions, EightBitTensor
    from torch import Tensor

BLOCKS, NUM_WARPS = 4, 4
"""Blocks of 256 elements a program: eight elements a thread, whose loads of fp32 are 16 bytes wide."""


@triton.jit
def _nearest(x, table):
    """Index of the value of an ascending table of 256 that lies next to x."""
    low = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(8):
        middle = low + (128 >> bit)
        low = tl.where(tl.load(table + middle) <= x, middle, low)
    high = tl.minimum(low + 1, 255)
    below, above = tl.load(table + low), tl.load(table + high)
    return tl.where(x > (below + above) * 0.5, high, low)


@triton.jit
def _rounded(moment, absmax, table):
    """Codes of a moment's blocks."""
    return _nearest(moment / tl.where(absmax > 0, absmax, 1.0)[:, None], table)


@triton.jit
def _update(
    addresses,
    sizes,
    owners,
    firsts,
    count,
    kind,
    m_table,
    v_table,
    beta1,
    rest1,
    beta2,
    rest2,
    rate,
    root2,
    eps,
    decay,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    row = addresses + owner
    p_at = tl.load(row).to(kind.dtype)
    g_at = tl.load(row + count).to(kind.dtype)
    m_at = tl.load(row + 2 * count).to(tl.pointer_type(tl.uint8))
    v_at = tl.load(row + 3 * count).to(tl.pointer_type(tl.uint8))
    m_max = tl.load(row + 4 * count).to(tl.pointer_type(tl.float32))
    v_max = tl.load(row + 5 * count).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        p_at, g_at = tl.multiple_of(p_at, 16), tl.multiple_of(g_at, 16)
        m_at, v_at = tl.multiple_of(m_at, 16), tl.multiple_of(v_at, 16)
    size = tl.load(sizes + owner)
    block = tl.load(firsts + program).to(tl.int64) + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    here = i < size
    exists = block * BLOCK < size
    g = tl.load(g_at + i, mask=here, other=0.0).to(tl.float32)
    p = tl.load(p_at + i, mask=here, other=0.0).to(tl.float32)
    m_code = tl.load(m_at + i, mask=here, other=0).to(tl.int32)
    v_code = tl.load(v_at + i, mask=here, other=0).to(tl.int32)
    m_old = tl.load(m_table + m_code) * tl.load(m_max + block, mask=exists, other=0.0)[:, None]
    v_old = tl.load(v_table + v_code) * tl.load(v_max + block, mask=exists, other=0.0)[:, None]
    finite = (tl.abs(g) < float("inf")) & here  # false for NaN too
    m = tl.where(finite, beta1 * m_old + rest1 * g, 0.0)
    v = tl.where(finite, beta2 * v_old + rest2 * g * g, 0.0)
    new = decay * p - rate * m / (tl.sqrt(v) * root2 + eps)
    tl.store(p_at + i, tl.where(finite, new, p).to(kind.dtype.element_ty), mask=here)
    m_new, v_new = tl.max(tl.abs(m), axis=1), tl.max(v, axis=1)
    tl.store(m_max + block, m_new, mask=exists)
    tl.store(v_max + block, v_new, mask=exists)
    m_code = _rounded(m, m_new, m_table)
    lost_sign = (m < 0) & (tl.load(m_table + m_code) >= 0)
    m_code = tl.maximum(m_code - lost_sign.to(tl.int32), 0)
    tl.store(m_at + i, m_code.to(tl.uint8), mask=here)
    tl.store(v_at + i, _rounded(v, v_new, v_table).to(tl.uint8), mask=here)


@lru_cache(maxsize=16)
def _shares(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(elements of each tensor, each program's tensor, each program's first block) on the device."""
    counts = [-(-size // (BLOCK * BLOCKS)) for size in sizes]
    owners = torch.repeat_interleave(torch.tensor(counts))
    firsts = torch.cat([torch.arange(n) for n in counts]) * BLOCKS
    return (
        torch.tensor(sizes, dtype=torch.int64).to(device),
        owners.to(device, torch.int32),
        firsts.to(device, torch.int32),
    )


@torch.no_grad()
def update_(
    tensors: Sequence[EightBitTensor], m_table: Tensor, v_table: Tensor, options: AdamWOptions
) -> None:
    """As the reference, in one launch that waits for nothing."""
    tensors = [tensor for tensor in tensors if tensor.parameter.numel()]
    if not tensors:
        return
    first = tensors[0].parameter
    sizes, owners, firsts = _shares(tuple(t.parameter.numel() for t in tensors), first.device)
    operands = (
        [t.parameter.data_ptr() for t in tensors],
        [t.gradient.data_ptr() for t in tensors],
        [t.m_codes.data_ptr() for t in tensors],
        [t.v_codes.data_ptr() for t in tensors],
        [t.m_absmax.data_ptr() for t in tensors],
        [t.v_absmax.data_ptr() for t in tensors],
    )
    # From memory that is not pinned: the driver has copied it before this returns, and waits for no kernel.
    addresses = torch.tensor(operands, dtype=torch.int64).to(first.device, non_blocking=True)
    c1, c2 = 1 - options.beta1**options.step, 1 - options.beta2**options.step
    launch(
        _update,
        owners.numel(),
        (
            addresses,
            sizes,
            owners,
            firsts,
            len(tensors),
            first,
            m_table,
            v_table,
            options.beta1,
            1 - options.beta1,
            options.beta2,
            1 - options.beta2,
            options.lr / c1,
            1 / sqrt(c2),
            options.eps,
            1 - options.lr * options.weight_decay,
        ),
        {
            "ALIGNED": all(at % 16 == 0 for ats in operands[:4] for at in ats),
            "BLOCKS": BLOCKS,
            "BLOCK": BLOCK,
        },
        num_warps=NUM_WARPS,
    )
    torch.autograd.graph.increment_version([t.parameter for t in tensors])
