"""The adapters' gradients by GEMMs: for ranks that registers do not hold, and for dropout's several inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_engine.gemm import matmul_to
from hotloop_engine.ops.dropout import dropout

from .sink import add_gradient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from hotloop_engine.ops.adapter_gradients.reference import ColumnScale

    from .group import LinearGroup
    from .sink import GradientSink


def one_by_one(
    group: LinearGroup,
    dy_TN: Tensor,
    dt_TC: Tensor,
    x_TK: Tensor,
    t_TR: Tensor,
    sink: GradientSink,
    row_scale: Tensor | None,
    column_scale: ColumnScale | None,
    seeds: Sequence[int],
) -> None:
    """Puts dA and dB of each projection into `sink`; arguments as of `LinearGroup.backward_parameters`."""
    scaled = dt_TC if row_scale is None else (dt_TC * row_scale[:, None]).to(group.dtype)
    whole = None
    if not group.drops:
        whole = matmul_to(scaled[:, : group.rank].T, x_TK, group.sum_dtype)
        if column_scale is not None:
            whole *= column_scale.values()
    for i, view in enumerate(group.views):
        lora = view.lora
        if lora is None or not (lora.a_RK.requires_grad or lora.b_NR.requires_grad):
            continue
        rows, ranks = group.rows[i], group.ranks[i]
        add_gradient(sink, lora.b_NR, matmul_to(dy_TN[:, rows].T, t_TR[:, ranks], group.sum_dtype))
        if whole is not None:
            da = whole[ranks]
        else:
            x_in = dropout(x_TK, lora.dropout, seeds[i]) if lora.dropout > 0 else x_TK
            da = matmul_to(dt_TC[:, ranks].T, x_in, group.sum_dtype)
        add_gradient(sink, lora.a_RK, da * lora.scale)
