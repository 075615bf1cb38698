"""Attention on values without their bias: gradients of q and k that a large bias does not coarsen.

Rows of p sum to one, so for any constant c of a head

    sum_j p_ij v_j = c + sum_j p_ij (v_j - c),

and c drops out of every gradient. Backward takes delta_i = do_i . o_i from an o that was rounded to 16 bits; with
c = v's bias that rounding is relative to v - c, not to v: v is projected without it. See derivation.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def add_centre(o_THK: Tensor, centre_GK: Tensor, *, out: Tensor | None = None) -> Tensor:
    """o + c, one rounding, from attention's output over centred values; the H / G heads of a group share a row of c.

    Backward of attention takes the o without c: keep that one.

    Returns `out`, a view like o with any strides (o itself is allowed), or a new tensor.
    """
    grouped = (centre_GK.shape[0], o_THK.shape[1] // centre_GK.shape[0])
    total = o_THK.new_empty(o_THK.shape) if out is None else out
    torch.add(o_THK.unflatten(1, grouped), centre_GK[:, None], out=total.unflatten(1, grouped))
    return total
