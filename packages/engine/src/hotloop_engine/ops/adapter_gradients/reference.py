"""Sums over tokens in plain torch: what the adapters' gradients are made of.

A sum is held as [S, M, P] fp32: S partial sums over shares of the tokens, P at least the number of columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hotloop_engine.ops.lora_linear import LinearGroup


WIDEST = 64
"""Columns up to which the sums of a 128-column tile stay in a multiprocessor's registers."""


class ColumnScale(NamedTuple):
    """What a norm multiplies each column by: offset + weight [K]."""

    weight_K: Tensor
    offset: float

    def values(self) -> Tensor:
        """[K] in fp32 (fp64 for fp64)."""
        weight = self.weight_K.detach()
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.offset


def fits(group: LinearGroup) -> bool:
    """Whether the gradients of this group are made from sums over all its columns; else one by one, by GEMMs."""
    return 0 < group.rank <= WIDEST


def column_sums(a_TM: Tensor, b_TC: Tensor, *, row_scale_T: Tensor | None = None) -> Tensor:
    """Returns a^T (r ∘ b) as [1, M, C] fp32 (fp64 for fp64); r ∘ b is rounded to b's dtype."""
    if row_scale_T is not None:
        b_TC = (b_TC * row_scale_T[:, None]).to(b_TC.dtype)
    if a_TM.dtype in (torch.float32, torch.float64):
        return (a_TM.T @ b_TC)[None]
    if a_TM.device.type == "cuda":
        return torch.mm(a_TM.T, b_TC, out_dtype=torch.float32)[None]
    return (a_TM.T.float() @ b_TC.float())[None]


def gradients(
    group: LinearGroup, db: Tensor, da: Tensor, column_scale: ColumnScale | None
) -> list[tuple[Tensor, Tensor] | None]:
    """Returns (dA [R, K], dB [N, R]) of each projection of the group, None where it has no adapter.

    db: sums [S, N, P] of dy and t. da: sums [S, K, P] of the group's input (before `column_scale`) and dt.
    """
    db_NC, da_KC = db.sum(0), da.sum(0)
    if column_scale is not None:
        da_KC = da_KC * column_scale.values()[:, None]
    return [
        None
        if view.lora is None
        else (
            (da_KC[:, ranks] * view.lora.scale).T.contiguous(),
            db_NC[rows, ranks].contiguous(),
        )
        for view, rows, ranks in zip(group.views, group.rows, group.ranks, strict=True)
    ]
