"""How many tokens go through the tile of logits at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

TILE_BYTES = 576 * 2**20
"""The most that the tile of logits takes: 1,152 tokens of a vocabulary of 256,000 in 16 bit, whose gradient fills the
132 multiprocessors of an H100 once, and well under 1 GiB with what lies beside it."""

GEMM_TILE = (128, 256)
"""Rows and columns of a product that one multiprocessor makes at a time: cuBLAS's largest tile for 16-bit operands."""


def chunk_tokens(count: int, weight_VD: Tensor, dtype: torch.dtype, asked: int | None) -> int:
    """Tokens in a tile, of `count` trained ones.

    The gradient of a chunk, [C, V] x [V, D], is a small product with a long sum: few tiles, so the last round of them
    may leave most of the card idle. Of the chunks that fit into `TILE_BYTES` those are taken for which both products
    need the fewest rounds; and of those the largest, shared out evenly where that costs nothing.

    Raises:
        ConfigError: `asked` is below 1.
    """
    if asked is not None:
        if asked < 1:
            raise ConfigError(f"chunk_tokens is {asked}; expected at least 1, or None.")
        return asked
    vocabulary, width = weight_VD.shape
    step = GEMM_TILE[0]
    most = TILE_BYTES // (max(1, vocabulary) * dtype.itemsize)
    if most < step:
        return max(1, most)
    largest = min(most // step, max(1, -(-count // step)))
    multiprocessors = _multiprocessors(weight_VD.device)

    def cost(tokens: int) -> int:
        return sum(
            chunks * length * _rounds(rows, columns, multiprocessors)
            for rows, chunks in ((tokens, count // tokens), (count % tokens, 1))
            for columns, length in ((vocabulary, width), (width, vocabulary))
        )

    best = min((tokens * step for tokens in range(largest, 0, -1)), key=cost)
    chunks = -(-count // best)
    even = -(-count // max(1, chunks) // step) * step
    return even if even and cost(even) <= cost(best) else best


def _rounds(rows: int, columns: int, multiprocessors: int) -> int:
    tiles = -(-rows // GEMM_TILE[0]) * -(-columns // GEMM_TILE[1])
    return -(-tiles // multiprocessors)


def _multiprocessors(device: torch.device) -> int:
    """How many tiles run at once; 1 where that is not known, which makes all chunks cost the same."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
