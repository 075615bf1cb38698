"""The activation of an MLP beside its adapters' products in Triton: every wide tensor is read once and written once.

Forward: a program owns rows, walks along the columns, and has t when it arrives at their end. Backward: a program owns
columns and walks down a share of the tokens, with the sums for three adapter gradients in registers; act(gate) * up is
never written. Shapes as in `reference.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hotloop_engine.ops.adapter_gradients.kernel import add_outer, padded, shares
from hotloop_engine.ops.adapter_gradients.reference import WIDEST
from hotloop_engine.ops.glu.kernel import activate
from hotloop_engine.ops.kernel import launch, multiprocessors

from . import reference

if TYPE_CHECKING:
    from hotloop_core.kernels import Activation
    from torch import Tensor

FORWARD_COLUMNS, FORWARD_WARPS = 256, 8
ROWS, COLUMNS, NUM_WARPS = 32, 128, 8


@triton.jit
def _forward(
    gate,
    up,
    a,
    out,
    t_out,
    tokens,
    columns,
    rank,
    more,
    bias_column,
    gate_pitch,
    up_pitch,
    a_pitch,
    out_pitch,
    ACTIVATION: tl.constexpr,
    P: tl.constexpr,
    MORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (t < tokens)[:, None]
    line = t[:, None].to(tl.int64)
    p = tl.arange(0, P)
    total = tl.zeros((ROWS, P), dtype=tl.float32)
    for first in range(0, columns, COLUMNS):
        i = first + tl.arange(0, COLUMNS)
        here = inside & (i < columns)[None, :]
        g = tl.load(gate + line * gate_pitch + i[None, :], mask=here, other=0.0).to(tl.float32)
        u = tl.load(up + line * up_pitch + i[None, :], mask=here, other=0.0).to(tl.float32)
        activated, _ = activate(g, ACTIVATION)
        h = (activated * u).to(out.dtype.element_ty)
        tl.store(out + line * out_pitch + i[None, :], h, mask=here)
        rows = (p < rank)[:, None] & (i < columns)[None, :]
        narrow = tl.load(a + p[:, None] * a_pitch + i[None, :], mask=rows, other=0.0)
        total = tl.dot(h, tl.trans(narrow), total)
    result = tl.where((p == bias_column)[None, :], 1.0, total).to(out.dtype.element_ty)
    behind = out + line * out_pitch + columns
    tl.store(behind + p[None, :], result, mask=inside & (p < more)[None, :])
    rest = tl.arange(0, MORE)
    ones = tl.where((rest == bias_column)[None, :] & inside, 1.0, 0.0).to(out.dtype.element_ty)
    tl.store(
        behind + rest[None, :], ones, mask=inside & (rest >= P)[None, :] & (rest < more)[None, :]
    )
    to = t_out + line * rank + p[None, :]
    tl.store(to, total.to(t_out.dtype.element_ty), mask=inside & (p < rank)[None, :])


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
    for row in range(first, last, ROWS):
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
        h = (activated * u).to(kind)
        dgate = (d * u * derivative).to(kind)
        dup = (d * activated).to(kind)
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


def forward(
    gate_TI: Tensor,
    up_TI: Tensor,
    a_CI: Tensor,
    *,
    activation: Activation,
    out: Tensor,
    rank: int,
    bias: bool,
) -> Tensor:
    """As the reference; ranks above 64 and 32-bit tensors are the reference's."""
    tokens, columns = gate_TI.shape
    if rank > WIDEST or not _narrow(gate_TI[:, :1]):
        return reference.forward(
            gate_TI, up_TI, a_CI, activation=activation, out=out, rank=rank, bias=bias
        )
    t_TR = gate_TI.new_empty(tokens, rank)
    # A program walks along its rows: enough programs to fill the card come before rows that share A.
    rows = 32 if tokens >= 32 * 2 * multiprocessors(gate_TI.device) else 16
    more = out.shape[1] - columns
    launch(
        _forward,
        triton.cdiv(tokens, rows),
        (
            gate_TI,
            up_TI,
            a_CI,
            out,
            t_TR,
            tokens,
            columns,
            rank,
            more,
            rank if bias else -1,
            gate_TI.stride(0),
            up_TI.stride(0),
            a_CI.stride(0),
            out.stride(0),
        ),
        {
            "ACTIVATION": activation,
            "P": padded(rank),
            "MORE": triton.next_power_of_2(max(16, more)),
            "ROWS": rows,
            "COLUMNS": FORWARD_COLUMNS,
        },
        num_warps=FORWARD_WARPS,
    )
    return t_TR


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
    blocks = triton.cdiv(columns, COLUMNS)
    count, share = shares(tokens, blocks, gate_TI.device)
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
        {"ACTIVATION": activation, "PB": pb, "PA": pa, "ROWS": ROWS, "COLUMNS": COLUMNS},
        num_warps=NUM_WARPS,
    )
    return db, da
