"""Blocks whose 4-bit codes stand for unevenly spaced values: IQ4_NL, IQ4_XS, MXFP4.

As in `k_quants`, a function takes x [rows, K] in float32 and gives the blocks' bytes. Layouts: ggml's
`ggml-common.h`; MXFP4: OCP Microscaling Formats 1.0, section 5.
"""

from __future__ import annotations

from itertools import pairwise
from math import ulp
from typing import TYPE_CHECKING

import torch

from .parts import half, inverse, pack, weighted, widest
from .searches import Table

if TYPE_CHECKING:
    from torch import Tensor

    from .searches import Searches

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the codes of IQ4_NL and IQ4_XS stand for, times the scale: denser around 0, as weights are."""
MIDDLES = tuple((a + b) / 2 for a, b in pairwise(IQ4))
_IQ4 = Table(tuple(range(16)), MIDDLES)
_FP4 = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""The middles between 0, 0.5, 1, 1.5, 2, 3, 4 and 6, the values of FP4 E2M1; its codes have the sign on top."""
_MXFP4 = Table(
    codes=(*range(15, 8, -1), *range(8)),
    # A tie goes to the value nearer to 0: a positive middle is the next float32 above it.
    middles=(*(-m for m in reversed(_FP4)), *(m + ulp(m) * 2**29 for m in _FP4)),
)


def iq4_nl(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d, 16 bytes of two codes; x = d v, 32 values."""
    scale = searches.table(x.reshape(-1, 32), _weight(x, importance, searches, 32))
    codes = searches.nearest(x.reshape(-1, 32), inverse(scale), _IQ4)
    return torch.cat([half(scale[:, None]), pack(codes, 2, 16)], 1)


def iq4_xs(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """float16 d, 2 bytes of upper and 4 of lower scale bits, 128 bytes of two codes.

    8 groups of 32: x = d (s - 32) v with 6-bit s, whose low nibbles lie in pairs, its upper bits in fours.
    """
    scale = searches.table(x.reshape(-1, 32), _weight(x, importance, searches, 256)).reshape(-1, 8)
    d = widest(scale) / -32
    s = (scale * inverse(d)).round_().clamp_(-32, 31)
    codes = searches.nearest(x.reshape(-1, 32), inverse(d * s).reshape(-1), _IQ4)
    s = (s + 32).to(torch.uint8)
    high = (s >> 4).reshape(-1, 2, 4)
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    low = (s & 15).reshape(-1, 4, 2)
    low = low[:, :, 0] | low[:, :, 1] << 4
    return torch.cat([half(d), high, low, pack(codes, 2, 16).reshape(-1, 128)], 1)


def mxfp4(x: Tensor, importance: Tensor | None, searches: Searches) -> Tensor:
    """1 byte of exponent e, 16 bytes of two codes; x = 2^(e - 127) v, v in FP4 E2M1, 32 values.

    e brings the largest value to 4 ..< 8. There is no search, so importance changes nothing.
    """
    groups = x.reshape(-1, 32)
    e = ((searches.largest(groups).view(torch.int32) >> 23) - 2).clamp_(min=0)
    shrink = ((254 - e) << 23).view(torch.float32)  # 2^(127 - e)
    codes = searches.nearest(groups, shrink, _MXFP4)
    return torch.cat([e.to(torch.uint8)[:, None], pack(codes, 2, 16)], 1)


def _weight(x: Tensor, importance: Tensor | None, searches: Searches, block: int) -> Tensor | None:
    if importance is None:
        return None
    return weighted(x, importance, searches, block, 2.0).reshape(-1, 32)
