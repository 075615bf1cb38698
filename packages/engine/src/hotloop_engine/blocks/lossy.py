"""Keys and values that wait for backward in NF4: a quarter of the memory, at the price of inexact gradients.

Only on request (`LayerPlan.nf4_kv`). Forward is exact; backward's attention sees the rounded keys and values, so the
gradients of q, k, v and of all that lies before them change.
"""

from __future__ import annotations

from functools import cache

import torch
from hotloop_core.kernels import FourBitWeight
from torch import Tensor

from hotloop_engine.ops.nf4 import dequantize_4bit

BLOCK = 64
# arXiv:2305.14314, appendix E: quantiles of a normal distribution, with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_ROWS = 4096  # quantised at once, so that the fp32 copies stay small

Packed = tuple[Tensor, Tensor, Tensor]
"""q [T, Q] as it was, codes uint8 [T, N / 2] of keys and values, absmax fp32 [T, N / 64]."""


def pack(qkv: Tensor, queries: int, kv: int) -> Packed:
    """qkv [T, >= Q + N] with Q query columns and N of keys and values (a multiple of 64)."""
    _, borders = _tables(qkv.device)
    tokens = qkv.shape[0]
    packed = torch.empty(tokens, kv // 2, dtype=torch.uint8, device=qkv.device)
    absmax = torch.empty(tokens, kv // BLOCK, dtype=torch.float32, device=qkv.device)
    for first in range(0, tokens, _ROWS):
        rows = slice(first, first + _ROWS)
        x = qkv[rows, queries : queries + kv].float().unflatten(1, (-1, BLOCK))
        scale = x.abs().amax(-1)
        absmax[rows] = scale
        unit = x / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        codes = torch.bucketize(unit, borders, out_int32=True).to(torch.uint8).flatten(1)
        packed[rows] = (codes[:, ::2] << 4) | codes[:, 1::2]
    return qkv[:, :queries].contiguous(), packed, absmax


def unpack(parts: Packed, out: Tensor) -> Tensor:
    """Writes q and the rounded keys and values into the first columns of `out` [T, >= Q + N]; returns it."""
    q, packed, absmax = parts
    code, _ = _tables(out.device)
    queries, kv = q.shape[1], 2 * packed.shape[1]
    out[:, :queries] = q
    weight = FourBitWeight(
        packed=packed.flatten(),
        absmax=absmax.flatten(),
        code=code,
        blocksize=BLOCK,
        shape=(q.shape[0], kv),
        dtype=out.dtype,
        kind="nf4",
    )
    dequantize_4bit(weight, out=out[:, queries : queries + kv])
    return out


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The code, and the borders half way between its values."""
    code = torch.tensor(NF4, dtype=torch.float32, device=device)
    return code, (code[1:] + code[:-1]) / 2
