"""The adapter's share of E in one launch: what `reference.fill_columns` says, for up to three projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .views import LinearView

ROWS = 64  # rows of B a program: its columns are few, so a program writes 64 x 64 values
WIDTH = 1024  # columns of A a program: one row of A, 16-byte accesses with 4 warps
MOST = 3  # q, k, v; a larger group takes the reference, whose launches are many but small


@triton.jit
def _tile_b(tile, b_ptr, bias_ptr, n, c, first_n, last_n, first_c, rank, b_row, bias_column):
    """`tile` with one projection's B, and its bias, put in."""
    row, column = (n - first_n)[:, None], (c - first_c)[None, :]
    mine = (n >= first_n)[:, None] & (n < last_n)[:, None]
    inside = mine & (column >= 0) & (column < rank)
    tile = tl.where(
        inside, tl.load(b_ptr + row * b_row + column, mask=inside, other=0.0).to(tl.float32), tile
    )
    if bias_ptr is not None:
        at_bias = mine & (c == bias_column)[None, :]
        bias = tl.load(bias_ptr + row + 0 * column, mask=at_bias, other=0.0).to(tl.float32)
        tile = tl.where(at_bias, bias, tile)
    return tile


@triton.jit
def _line_a(line, a_ptr, c, k, columns, first_c, rank, a_row, scale):
    """`line`, row c of the group's A, where it belongs to this projection."""
    mine = (c >= first_c) & (c < first_c + rank)
    inside = mine & (k < columns)
    a = tl.load(a_ptr + (c - first_c) * a_row + k, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, a * scale, line)


@triton.jit
def _fill(
    out_b,
    out_a,
    b_pitch,
    a_pitch,
    n_total,
    k_total,
    columns,
    bias_column,
    b0,
    b1,
    b2,
    a0,
    a1,
    a2,
    bias0,
    bias1,
    bias2,
    n1,
    n2,
    c1,
    c2,
    r0,
    r1,
    r2,
    scale0,
    scale1,
    scale2,
    b_programs,
    a_blocks,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    if program < b_programs:
        n = program * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, PADDED)
        tile = tl.zeros((ROWS, PADDED), dtype=tl.float32)
        tile = _tile_b(tile, b0, bias0, n, column, 0, n1, 0, r0, r0, bias_column)
        tile = _tile_b(tile, b1, bias1, n, column, n1, n2, c1, r1, r1, bias_column)
        tile = _tile_b(tile, b2, bias2, n, column, n2, n_total, c2, r2, r2, bias_column)
        inside_b = (n < n_total)[:, None] & (column < columns)[None, :]
        to_b = out_b + n[:, None].to(tl.int64) * b_pitch + column[None, :]
        tl.store(to_b, tile.to(out_b.dtype.element_ty), mask=inside_b)
    else:
        row = (program - b_programs) // a_blocks
        k = ((program - b_programs) % a_blocks) * WIDTH + tl.arange(0, WIDTH)
        rows = row + tl.zeros_like(k)
        line = tl.zeros((WIDTH,), dtype=tl.float32)
        line = _line_a(line, a0, rows, k, k_total, 0, r0, k_total, scale0)
        line = _line_a(line, a1, rows, k, k_total, c1, r1, k_total, scale1)
        line = _line_a(line, a2, rows, k, k_total, c2, r2, k_total, scale2)
        to_a = out_a + row.to(tl.int64) * a_pitch + k
        tl.store(to_a, line.to(out_a.dtype.element_ty), mask=k < k_total)


def fill_columns(
    views: Sequence[LinearView],
    rows: Sequence[slice],
    ranks: Sequence[slice],
    b_NC: Tensor,
    a_CK: Tensor,
    *,
    bias_column: int,
) -> None:
    """As `reference.fill_columns`; adapters of up to three projections, contiguous, in one launch."""
    loras = [view.lora for view in views]
    contiguous = all(
        lora is None or (lora.a_RK.is_contiguous() and lora.b_NR.is_contiguous()) for lora in loras
    )
    if len(views) > MOST or not contiguous:
        reference.fill_columns(views, rows, ranks, b_NC, a_CK, bias_column=bias_column)
        return
    n_total, columns = b_NC.shape
    k_total = a_CK.shape[1]
    # A projection that is not there has no rows and no ranks; any pointer stands for what is never read.
    missing = MOST - len(views)
    firsts = [r.start for r in rows] + [n_total] * missing
    starts = [r.start for r in ranks] + [columns] * missing
    sizes = [r.stop - r.start for r in ranks] + [0] * missing
    b_parts = [b_NC if lora is None else lora.b_NR for lora in loras] + [b_NC] * missing
    a_parts = [a_CK if lora is None else lora.a_RK for lora in loras] + [a_CK] * missing
    biases = [view.bias for view in views] + [None] * missing
    scales = [0.0 if lora is None or lora.dropout > 0 else lora.scale for lora in loras] + [
        0.0
    ] * missing
    b_programs, a_blocks = triton.cdiv(n_total, ROWS), triton.cdiv(k_total, WIDTH)
    _fill[(b_programs + columns * a_blocks,)](
        b_NC,
        a_CK,
        b_NC.stride(0),
        a_CK.stride(0),
        n_total,
        k_total,
        columns,
        bias_column,
        *b_parts,
        *a_parts,
        *biases,
        firsts[1],
        firsts[2],
        starts[1],
        starts[2],
        *sizes,
        *scales,
        b_programs,
        a_blocks,
        ROWS=ROWS,
        PADDED=triton.next_power_of_2(columns),
        WIDTH=WIDTH,
        num_warps=4,
    )
