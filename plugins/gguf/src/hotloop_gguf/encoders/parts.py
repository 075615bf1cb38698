"""What the block layouts share. All tensors are on one device; bytes are uint8."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .searches import Searches


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
    moved = (words[:, :, i] >> shift << i * bits for i in range(parts))
    return reduce(or_, moved).flatten(1).view(torch.uint8)


def widest(scale: Tensor) -> Tensor:
    """[blocks, 1]: of each block's scales the one farthest from 0, with its sign; the first of equals."""
    return scale.gather(1, scale.abs().argmax(1, keepdim=True))
