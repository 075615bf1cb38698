"""The backward of an MLP's activation beside its adapters' products in Triton: every wide tensor is read once.

A program owns columns and walks down a share of the tokens, with the sums for three adapter gradients in registers;
act(gate) * up is never written. Shapes as in `reference.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hotloop_engine.ops.adapter_gradients.kernel import Tile, add_outer, padded, shares
from hotloop_engine.ops.adapter_gradients.reference import WIDEST
from hotloop_engine.ops.glu.kernel import activate
from hotloop_engine.ops.kernel import cdiv, launch, made_once

from . import reference

if TYPE_CHECKING:
    from hotloop_core.kernels import Activation
    from torch import Tensor

# Of nine tiles tried on an H200 the fastest: 0.64 ms for an 8B's MLP at 16,384 tokens, 88% of the copy rate, the others
# 0.79 to 1.16 (benchmarks/tune_adapters.py). Without `made_once` it took 1.20.
TILE = Tile(rows=32, columns=64, warps=4, stages=3)


@triton.jit
def _backward(
    dh,
    gate,
    up,
    t_in,
    dt_in,
    db,
    da,
    tokens,
    columns,
    blocks,
    share,
    dh_pitch,
    gate_pitch,
    up_pitch,
    t_pitch,
    dt_pitch,
    b_columns,
    a_columns,
    ACTIVATION: tl.constexpr,
    PB: tl.constexpr,
    PA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    part = program // blocks
    i = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    pb, pa = tl.arange(0, PB), tl.arange(0, PA)
    sum_gate = tl.zeros((COLUMNS, PB), dtype=tl.float32)
    sum_up = tl.zeros((COLUMNS, PB), dtype=tl.float32)
    sum_h = tl.zeros((COLUMNS, PA), dtype=tl.float32)
    first = part * share
    last = tl.minimum(first + share, tokens)
    kind = gate.dtype.element_ty
    for row in tl.range(first, last, ROWS, num_stages=STAGES):
        t = row + tl.arange(0, ROWS)
        inside = (t < last)[:, None]
        line = t[:, None].to(tl.int64)
        here = inside & (i < columns)[None, :]
        gate_at = gate + line * gate_pitch + i[None, :]
        up_at = up + line * up_pitch + i[None, :]
        g = tl.load(gate_at, mask=here, other=0.0).to(tl.float32)
        u = tl.load(up_at, mask=here, other=0.0).to(tl.float32)
        d = tl.load(dh + line * dh_pitch + i[None, :], mask=here, other=0.0).to(tl.float32)
        activated, derivative = activate(g, ACTIVATION)
        h = made_once((activated * u).to(kind))
        dgate = made_once((d * u * derivative).to(kind))
        dup = made_once((d * activated).to(kind))
        tl.store(gate_at, dgate, mask=here)
        tl.store(up_at, dup, mask=here)
        t_tile = tl.load(
            t_in + line * t_pitch + pb[None, :], mask=inside & (pb < b_columns)[None, :], other=0.0
        )
        dt_tile = tl.load(
            dt_in + line * dt_pitch + pa[None, :],
            mask=inside & (pa < a_columns)[None, :],
            other=0.0,
        )
        sum_gate = add_outer(sum_gate, dgate, t_tile)
        sum_up = add_outer(sum_up, dup, t_tile)
        sum_h = add_outer(sum_h, h, dt_tile)
    exists = (i < columns)[:, None]
    to_b = db + (part * 2 * columns + i)[:, None] * PB + pb[None, :]
    tl.store(to_b, sum_gate, mask=exists)
    tl.store(to_b + columns * PB, sum_up, mask=exists)
    to_a = da + (part * columns + i)[:, None] * PA + pa[None, :]
    tl.store(to_a, sum_h, mask=exists)


def _narrow(*tensors: Tensor) -> bool:
    return all(
        t.shape[1] <= WIDEST and t.dtype in (torch.bfloat16, torch.float16) and t.shape[0] > 0
        for t in tensors
    )


def backward_(
    dh_TI: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    t_TR: Tensor,
    dt_TR: Tensor,
    *,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """As the reference; more than 64 adapter columns and 32-bit tensors are the reference's."""
    if not _narrow(t_TR, dt_TR, gate_TI[:, :1]):
        return reference.backward_(dh_TI, gate_TI, up_TI, t_TR, dt_TR, activation=activation)
    tokens, columns = gate_TI.shape
    blocks = cdiv(columns, TILE.columns)
    count, share = shares(tokens, blocks, TILE.rows, gate_TI.device)
    pb, pa = padded(t_TR.shape[1]), padded(dt_TR.shape[1])
    db = torch.empty(count, 2 * columns, pb, dtype=torch.float32, device=gate_TI.device)
    da = torch.empty(count, columns, pa, dtype=torch.float32, device=gate_TI.device)
    launch(
        _backward,
        count * blocks,
        (
            dh_TI,
            gate_TI,
            up_TI,
            t_TR,
            dt_TR,
            db,
            da,
            tokens,
            columns,
            blocks,
            share,
            dh_TI.stride(0),
            gate_TI.stride(0),
            up_TI.stride(0),
            t_TR.stride(0),
            dt_TR.stride(0),
            t_TR.shape[1],
            dt_TR.shape[1],
        ),
        {
            "ACTIVATION": activation,
            "PB": pb,
            "PA": pa,
            "ROWS": TILE.rows,
            "COLUMNS": TILE.columns,
            "STAGES": TILE.stages,
        },
        num_warps=TILE.warps,
    )
    return db, da
