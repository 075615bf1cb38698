"""Sums over tokens in Triton: a program owns columns of the wide operand and walks down a share of the tokens.

The wide operand (dy, x, the activations) is read once, at the memory's rate; the narrow one stays in cache. Partial
sums of the shares are added in order by a second, small launch: no atomics, the same bits every time. Shapes as in
`reference.py`.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from hotloop_engine.ops.kernel import cdiv, launch, multiprocessors, power_of_2

from . import reference
from .reference import WIDEST, ColumnScale

if TYPE_CHECKING:
    from torch import Tensor

    from hotloop_engine.ops.lora_linear import LinearGroup


class Tile(NamedTuple):
    """What of the wide operand a program has at once, and how it runs."""

    rows: int
    columns: int
    warps: int
    stages: int


TILE = Tile(rows=64, columns=128, warps=4, stages=3)
LINES = 64  # of dA and dB, for a program that adds partial sums
MOST = 3  # projections in a group


@cache
def padded(columns: int) -> int:
    """P for a number of columns: a power of two that the tensor cores take."""
    return max(16, power_of_2(columns))


@lru_cache(maxsize=1024)
def shares(tokens: int, blocks: int, rows: int, device: torch.device) -> tuple[int, int]:
    """(number of shares, tokens in each, a multiple of `rows`) that give four programs a multiprocessor, at least 256
    tokens each.
    """
    wanted = max(1, -(-4 * multiprocessors(device) // max(1, blocks)))
    count = max(1, min(wanted, tokens // 256))
    share = -(-max(1, tokens) // (count * rows)) * rows
    return max(1, -(-tokens // share)), share


@triton.jit
def add_outer(total, wide, narrow):
    """total [M, P] + wide [T, M]^T narrow [T, P], in fp32."""
    return tl.dot(tl.trans(wide), narrow, total)


@triton.jit
def _column_sums(
    a,
    b,
    row_scale,
    out,
    tokens,
    m_total,
    blocks,
    share,
    a_pitch,
    b_pitch,
    columns,
    SCALED: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    part = program // blocks
    m = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.arange(0, P)
    first = part * share
    last = tl.minimum(first + share, tokens)
    total = tl.zeros((COLUMNS, P), dtype=tl.float32)
    for row in tl.range(first, last, ROWS, num_stages=STAGES):
        t = row + tl.arange(0, ROWS)
        inside = (t < last)[:, None]
        line = t[:, None].to(tl.int64)
        wide = tl.load(
            a + line * a_pitch + m[None, :], mask=inside & (m < m_total)[None, :], other=0.0
        )
        narrow = tl.load(
            b + line * b_pitch + p[None, :], mask=inside & (p < columns)[None, :], other=0.0
        )
        if SCALED:
            r = tl.load(row_scale + t, mask=t < last, other=0.0)
            narrow = (narrow.to(tl.float32) * r[:, None]).to(b.dtype.element_ty)
        total = add_outer(total, wide, narrow)
    to = out + (part * m_total + m)[:, None] * P + p[None, :]
    tl.store(to, total, mask=(m < m_total)[:, None])


@triton.jit
def _gradients(
    db,
    da,
    column_scale,
    out_b,
    out_a,
    n_total,
    k_total,
    b_shares,
    a_shares,
    n1,
    n2,
    c1,
    c2,
    c3,
    scale0,
    scale1,
    scale2,
    b_blocks,
    column_offset,
    SCALED: tl.constexpr,
    P: tl.constexpr,
    LINES: tl.constexpr,
):
    """Adds the partial sums; writes each projection's dB [n, r], one behind the other, and all of dA [C, K]."""
    program = tl.program_id(0)
    p = tl.arange(0, P)[None, :]
    total = tl.zeros((LINES, P), dtype=tl.float32)
    if program < b_blocks:
        n = (program * LINES + tl.arange(0, LINES))[:, None]
        for part in range(0, b_shares):
            total += tl.load(db + (part * n_total + n) * P + p, mask=n < n_total, other=0.0)
        second = n >= n1
        third = n >= n2
        start = tl.where(third, c2, tl.where(second, c1, 0))
        rank = tl.where(third, c3, tl.where(second, c2, c1)) - start
        row = n - tl.where(third, n2, tl.where(second, n1, 0))
        base = tl.where(third, n1 * c1 + (n2 - n1) * (c2 - c1), tl.where(second, n1 * c1, 0))
        column = p - start
        mine = (n < n_total) & (column >= 0) & (column < rank)
        tl.store(out_b + base + row * rank + column, total, mask=mine)
    else:
        k = ((program - b_blocks) * LINES + tl.arange(0, LINES))[:, None]
        for part in range(0, a_shares):
            total += tl.load(da + (part * k_total + k) * P + p, mask=k < k_total, other=0.0)
        if SCALED:
            total *= (
                tl.load(column_scale + k, mask=k < k_total, other=0.0).to(tl.float32)
                + column_offset
            )
        total *= tl.where(p >= c2, scale2, tl.where(p >= c1, scale1, scale0))
        tl.store(out_a + p * k_total + k, total, mask=(k < k_total) & (p < c3))


def fits(group: LinearGroup) -> bool:
    """As the reference, for 16-bit types and up to three projections, on cards since Ampere.

    Before, Triton makes scalar code of a matrix product (in `_column_sums` 9 KiB spilled a thread): there the GEMMs
    of cuBLAS are the faster way.
    """
    sixteen = group.dtype in (torch.bfloat16, torch.float16)
    few = len(group.views) <= MOST and reference.fits(group)
    return sixteen and few and _has_matrix_products(group.device)


@cache
def _has_matrix_products(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def column_sums(a_TM: Tensor, b_TC: Tensor, *, row_scale_T: Tensor | None = None) -> Tensor:
    """As the reference, in as many partial sums as keep the card busy; at most 64 columns of 16-bit tensors."""
    (tokens, m), columns = a_TM.shape, b_TC.shape[1]
    if columns > WIDEST or a_TM.dtype not in (torch.bfloat16, torch.float16) or not tokens:
        return reference.column_sums(a_TM, b_TC, row_scale_T=row_scale_T)
    blocks = cdiv(m, TILE.columns)
    count, share = shares(tokens, blocks, TILE.rows, a_TM.device)
    p = padded(columns)
    out = torch.empty(count, m, p, dtype=torch.float32, device=a_TM.device)
    launch(
        _column_sums,
        count * blocks,
        (
            a_TM,
            b_TC,
            b_TC if row_scale_T is None else row_scale_T,
            out,
            tokens,
            m,
            blocks,
            share,
            a_TM.stride(0),
            b_TC.stride(0),
            columns,
        ),
        {
            "SCALED": row_scale_T is not None,
            "P": p,
            "ROWS": TILE.rows,
            "COLUMNS": TILE.columns,
            "STAGES": TILE.stages,
        },
        num_warps=TILE.warps,
    )
    return out


class _Layout(NamedTuple):
    """Where a group's gradients lie in one buffer: all dB one behind the other, then dA [R, K]. sizes: of each dB."""

    sizes: list[int]
    numbers: tuple[float, ...]
    blocks: int


def _layout(group: LinearGroup) -> _Layout:
    known = group.prepared.get("adapter_gradients")
    if isinstance(known, _Layout):
        return known
    missing = MOST - len(group.views)
    rows = [r.start for r in (*group.rows[1:], *[slice(group.n, 0)] * missing)]
    ranks = [r.start for r in (*group.ranks[1:], *[slice(group.rank, 0)] * missing)]
    scales = [0.0 if view.lora is None else view.lora.scale for view in group.views]
    sizes = [
        (r.stop - r.start) * (c.stop - c.start)
        for r, c in zip(group.rows, group.ranks, strict=True)
    ]
    blocks = cdiv(group.n, LINES)
    numbers = (*rows, *ranks, group.rank, *scales, *[0.0] * missing, blocks)
    group.prepared["adapter_gradients"] = made = _Layout(sizes, numbers, blocks)
    return made


def gradients(
    group: LinearGroup, db: Tensor, da: Tensor, column_scale: ColumnScale | None
) -> list[tuple[Tensor, Tensor] | None]:
    """As the reference, for a group that `fits`: one launch, the results side by side in one buffer."""
    if not group.sums or db.shape[2] != padded(group.rank) or da.shape[2] != db.shape[2]:
        return reference.gradients(group, db, da, column_scale)
    layout, n, k, rank = _layout(group), group.n, group.k, group.rank
    of_b = sum(layout.sizes)
    out = torch.empty(of_b + rank * k, dtype=torch.float32, device=db.device)
    *parts, out_a = torch.split_with_sizes(out, [*layout.sizes, rank * k])
    launch(
        _gradients,
        layout.blocks + cdiv(k, LINES),
        (
            db,
            da,
            da if column_scale is None else column_scale.weight_K,
            out,
            out_a,
            n,
            k,
            db.shape[0],
            da.shape[0],
            *layout.numbers,
            0.0 if column_scale is None else column_scale.offset,
        ),
        {"SCALED": column_scale is not None, "P": db.shape[2], "LINES": LINES},
        num_warps=4,
    )
    da_RK = out_a.view(rank, k)
    return [
        None
        if view.lora is None
        else (da_RK[ranks], part.view(rows.stop - rows.start, ranks.stop - ranks.start))
        for view, rows, ranks, part in zip(group.views, group.rows, group.ranks, parts, strict=True)
    ]
