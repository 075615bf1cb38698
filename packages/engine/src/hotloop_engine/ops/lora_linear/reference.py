"""The equation of a LoRA projection in plain torch: the truth that the grouped GEMMs are tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hotloop_core.kernels import FourBitWeight
from torch import Tensor

from hotloop_engine.ops._select import implementation

if TYPE_CHECKING:
    from .group import LinearGroup
    from .views import LinearView


def lora_linear_reference(x_TK: Tensor, view: LinearView, mask_TK: Tensor | None = None) -> Tensor:
    """y = x W^T + b + s (x * mask) A^T B^T. mask: 0 or 1 / (1 - p), where the adapter has dropout."""
    y_TN = torch.nn.functional.linear(
        x_TK, dense_weight(view.weight, x_TK.dtype), _cast(view.bias, x_TK)
    )
    if view.lora is None:
        return y_TN
    x_TK = x_TK if mask_TK is None else x_TK * mask_TK
    a_RK, b_NR = view.lora.a_RK.to(x_TK.dtype), view.lora.b_NR.to(x_TK.dtype)
    return y_TN + view.lora.scale * (x_TK @ a_RK.T @ b_NR.T)


def dense_weight(weight: Tensor | FourBitWeight, dtype: torch.dtype) -> Tensor:
    """The weight as a dense [N, K] tensor of `dtype`."""
    if not isinstance(weight, FourBitWeight):
        return weight.to(dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    return implementation("nf4", out.device).forward(weight, out=out)


def _cast(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)


def fill_columns(group: LinearGroup, b_NC: Tensor, a_CK: Tensor) -> None:
    """Writes what rides beside the base weights of a group, every element of both buffers.

    b_NC: each view's B on its own rows and columns, the biases in column `group.rank`, zeros elsewhere.
    a_CK: s·A of each view on its own rows, multiplied in A's precision and rounded once; zeros for the bias, the
    padding and adapters with dropout, whose input is not x.
    """
    b_NC.zero_()
    a_CK.zero_()
    for view, n, r in zip(group.views, group.rows, group.ranks, strict=True):
        if view.lora is not None:
            b_NC[n, r] = view.lora.b_NR.detach().to(b_NC.dtype)
            if view.lora.dropout == 0:
                a_CK[r] = (view.lora.a_RK.detach() * view.lora.scale).to(a_CK.dtype)
        if view.bias is not None:
            b_NC[n, group.rank] = view.bias.detach().to(b_NC.dtype)


def extend(group: LinearGroup, e: Tensor) -> bool:
    """False: the reference fills E piece by piece, weights first, then `fill_columns`."""
    return False
