"""A weight in NF4 with double quantisation, as bitsandbytes stores it and transformers loads it.

    w is about code[q] (c[p] a_j + m)      blocks of 64 share a scale c[p] a_j + m, 256 of these scales share a_j

NF4: arXiv:2305.14314, appendix E. The 8-bit map of the scales: arXiv:1511.04561, as bitsandbytes has it.
"""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BLOCK, NESTED_BLOCK = 64, 256
_STATE_BYTES = 256
"""Room for the JSON of a quant state, which spaces fill: its length is known before its numbers are."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, in -1..1."""

SUFFIXES = (
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".absmax",
    "",
    ".quant_state.bitsandbytes__nf4",
)
"""What follows the weight's name, in the order in which `encode` gives the tensors: the wider dtypes first."""


def shapes(shape: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each tensor that `encode` gives for a weight of that shape; together a multiple of 4 bytes."""
    blocks = -(-prod(shape) // BLOCK)
    packed = -(-prod(shape) // 2)
    state = _STATE_BYTES + -(blocks + packed) % 8
    return [
        ("float32", (16,)),
        ("float32", (-(-blocks // NESTED_BLOCK),)),
        ("float32", (256,)),
        ("uint8", (blocks,)),
        ("uint8", (packed, 1)),
        ("uint8", (state,)),
    ]


def encode(weight: Tensor, dtype: str) -> list[Tensor]:
    """The tensors of `weight`, a float tensor on any device. dtype: what it is dequantised to, by torch name."""
    flat = weight.reshape(-1)
    blocks = -(-flat.numel() // BLOCK)
    scale = torch.empty(blocks, device=flat.device)
    packed = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=flat.device)
    code = torch.tensor(NF4, device=flat.device)
    step = BLOCK << 16  # 4 Mi values at once
    for start in range(0, flat.numel(), step):
        x = flat[start : start + step].float()
        x = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).reshape(-1, BLOCK)
        largest = x.abs().amax(1)
        first = start // BLOCK
        scale[first : first + len(x)] = largest
        q = _nearest(x * _inverse(largest)[:, None], code).reshape(-1, 2)
        packed[start // 2 : start // 2 + len(q)] = q[:, 0] << 4 | q[:, 1]
    dynamic = dynamic_map().to(flat.device)
    offset = scale.mean()
    centred = torch.nn.functional.pad(scale - offset, (0, -blocks % NESTED_BLOCK))
    centred = centred.reshape(-1, NESTED_BLOCK)
    nested = centred.abs().amax(1)
    absmax = _nearest(centred * _inverse(nested)[:, None], dynamic).reshape(-1)[:blocks]
    state = _state(weight.shape, dtype, float(offset), shapes(weight.shape)[-1][1][0])
    half = -(-flat.numel() // 2)
    return [code, nested, dynamic, absmax, packed[:half].reshape(-1, 1), state]


def dynamic_map() -> Tensor:
    """256 values in -1..1, denser around 0: [0.1, 1] in 2^i equal parts at 10^(i - 6), both signs, with 0 and 1."""
    positive = torch.cat(
        [
            (0.1 + 0.9 * (torch.arange(2**i, dtype=torch.float64) + 0.5) / 2**i) * 10.0 ** (i - 6)
            for i in range(7)
        ]
    )
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([-positive, positive, ends]).sort().values.float()


def _nearest(x: Tensor, code: Tensor) -> Tensor:
    """Index of the entry of `code` (ascending) nearest to each x; uint8."""
    return torch.bucketize(x, (code[1:] + code[:-1]) / 2).to(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _state(shape: Sequence[int], dtype: str, offset: float, length: int) -> Tensor:
    described = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": dtype,
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    text = json.dumps(described).encode()
    if len(text) > length:
        raise ExportError(
            f"a quant state of {len(text)} bytes for shape {tuple(shape)} has {length}"
        )
    return torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8)
