"""What the block layouts share. All tensors are on one device; bytes are uint8."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .searches import Searches

FIFTH_BITS, GATHER_BITS = 0x1010101010101010, 0x0010204081020408


def weighted(
    x: Tensor, importance: Tensor, searches: Searches, block: int, factor: float
) -> Tensor:
    """Weights of squared errors: importance sqrt(factor mean(x^2) + x^2), the mean over each `block` values.

    x: [rows, K] float32; importance: [K], the mean squared input of each column. Returns [rows, K].
    """
    squares = (x * x).reshape(-1, block)
    mean = searches.sums(squares) * factor / constant(block, x)
    return searches.root(squares.add_(mean[:, None])).reshape(x.shape).mul_(importance)


def constant(value: float, like: Tensor) -> Tensor:
    """A float32 to divide with: a Python number would be multiplied by its reciprocal on a GPU."""
    return torch.tensor(float(value), device=like.device)


def inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0."""
    return torch.where(d == 0, 0.0, 1.0 / d)


def half(d: Tensor) -> Tensor:
    """[blocks, 1] in float32 to the two bytes of its float16."""
    return d.to(torch.float16).view(torch.uint8)


def pack(q: Tensor, parts: int, width: int, shift: int = 0) -> Tensor:
    """Fields of 8 / parts bits, from bit `shift` of each q on, side by side: [blocks, values / parts].

    Of each parts * width values the first `width` go to the lowest fields of as many bytes, the next to
    the fields above them, and so on. q: [blocks, values]; width is a multiple of 8, because eight values
    at a time are treated as one integer.
    """
    bits = 8 // parts
    mask = int.from_bytes([(1 << bits) - 1 << shift] * 8)
    words = (q.view(torch.int64) & mask).reshape(len(q), -1, parts, width // 8)
    moved = (_moved(words[:, :, i], i * bits - shift) for i in range(parts))
    return reduce(or_, moved).flatten(1).view(torch.uint8)


def _moved(words: Tensor, bits: int) -> Tensor:
    return words << bits if bits > 0 else words >> -bits if bits < 0 else words


def even_block(d: Tensor, m: Tensor | None, q: Tensor, levels: int) -> Tensor:
    """float16 d, float16 m if there is one, 4 bytes of fifth bits if levels is 31, 16 bytes of two low nibbles.

    d, m: float32 [blocks, 1]. q: uint8 [blocks, 32]. Bit 4 of value j is bit j % 8 of fifth byte j // 8: eight bytes
    of 0 or 16 are one integer, and multiplying moves byte i's bit to place 56 + i.
    """
    parts = [half(d)] if m is None else [half(d), half(m)]
    if levels > 15:
        fifth = (q.view(torch.int64) & FIFTH_BITS).mul_(GATHER_BITS)
        parts.append(fifth.bitwise_right_shift_(56).to(torch.uint8))
    return torch.cat([*parts, pack(q, 2, 16)], 1)


def widest(scale: Tensor) -> Tensor:
    """[blocks, 1]: of each block's scales the one farthest from 0, with its sign; the first of equals."""
    return scale.gather(1, scale.abs().argmax(1, keepdim=True))
