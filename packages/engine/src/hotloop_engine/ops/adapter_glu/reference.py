"""The backward of an MLP's activation beside its adapters' products, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hotloop_engine.ops.adapter_gradients.reference import column_sums
from hotloop_engine.ops.glu import reference as glu

if TYPE_CHECKING:
    from hotloop_core.kernels import Activation
    from torch import Tensor


def backward_(
    dh_TI: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    t_TR: Tensor,
    dt_TR: Tensor,
    *,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """gate becomes dgate, up becomes dup, in place; dh is left undefined.

    t_TR: adapter inputs of gate and up, side by side. dt_TR: dy B of down.

    Returns:
        (sums of [dgate, dup] and t as [S, 2I, P], sums of h and dt as [S, I, P']), fp32; see
        `adapter_gradients.reference`.
    """
    glu.backward_(dh_TI, gate_TI, up_TI, activation=activation)
    db = torch.cat([column_sums(gate_TI, t_TR), column_sums(up_TI, t_TR)], dim=1)
    return db, column_sums(dh_TI, dt_TR)
