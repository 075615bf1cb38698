"""Blocks of 32 values with one float16 scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Bit for bit what ggml writes. Every function takes x [blocks, 32] in float32 and gives the blocks' bytes,
[blocks, bytes] in uint8. Source of the layouts: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def q8_0(x: Tensor) -> Tensor:
    """float16 d, 32 int8 q; x = d q, d = max|x| / 127, q rounded half away from zero."""
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * _inverse(d)
    whole = scaled.abs().floor()
    q = (whole + (2 * (scaled.abs() - whole)).floor()) * scaled.sign()
    return torch.cat([_half(d), q.to(torch.int8).view(torch.uint8)], 1)


def q4_0(x: Tensor) -> Tensor:
    """float16 d, 16 bytes of two q; x = d (q - 8), with the value farthest from 0 at q = 0."""
    d = _extreme(x) / -8
    q = (x * _inverse(d) + 8.5).to(torch.uint8).clamp_(max=15)
    return torch.cat([_half(d), _nibbles(q)], 1)


def q4_1(x: Tensor) -> Tensor:
    """float16 d and m, 16 bytes of two q; x = d q + m, m = min(x)."""
    d, m = _range(x, 15)
    q = ((x - m) * _inverse(d) + 0.5).to(torch.uint8).clamp_(max=15)
    return torch.cat([_half(d), _half(m), _nibbles(q)], 1)


def q5_0(x: Tensor) -> Tensor:
    """float16 d, 4 bytes of fifth bits, 16 bytes of two low nibbles; x = d (q - 16)."""
    d = _extreme(x) / -16
    q = (x * _inverse(d) + 16.5).to(torch.uint8).clamp_(max=31)
    return torch.cat([_half(d), _fifth_bits(q), _nibbles(q & 15)], 1)


def q5_1(x: Tensor) -> Tensor:
    """float16 d and m, 4 bytes of fifth bits, 16 bytes of two low nibbles; x = d q + m."""
    d, m = _range(x, 31)
    q = ((x - m) * _inverse(d) + 0.5).to(torch.uint8)
    return torch.cat([_half(d), _half(m), _fifth_bits(q), _nibbles(q & 15)], 1)


def _extreme(x: Tensor) -> Tensor:
    """The value farthest from 0, with its sign; the first where two are equally far."""
    return x.gather(1, x.abs().argmax(1, keepdim=True))


def _range(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    low = x.amin(1, keepdim=True)
    return (x.amax(1, keepdim=True) - low) / levels, low


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1.0 / d)


def _half(d: Tensor) -> Tensor:
    return d.to(torch.float16).view(torch.uint8)


def _nibbles(q: Tensor) -> Tensor:
    """Value j in the low half of byte j, value j + 16 in its high half."""
    return q[:, :16] | q[:, 16:] << 4


def _fifth_bits(q: Tensor) -> Tensor:
    """Bit 4 of value j as bit j % 8 of byte j // 8."""
    bits = (q >> 4).reshape(-1, 4, 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=q.device)
    return (bits * places).sum(2, dtype=torch.uint8)
