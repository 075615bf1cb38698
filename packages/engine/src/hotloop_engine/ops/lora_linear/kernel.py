"""E in one launch: 4-bit weights dequantised into it, and the adapters beside them, for up to three projections.

Launches cost the host more than these small pieces cost the device, so q, k, v and their adapters are one kernel: the
first programs dequantise a tile of a weight each, the next write B, the last write A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from hotloop_core.kernels import FourBitWeight
from torch import Tensor

from ..nf4.kernel import WORDS, dequantize_tile
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
def _edges(
    program,
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
    """One program's share of B (the first `b_programs`) or of A."""
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
    _edges(
        tl.program_id(0),
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
        ROWS,
        PADDED,
        WIDTH,
    )


@triton.jit
def _weight(
    tile, packed, absmax, outer, offset, code, nested_code, out, pitch, first_row, values,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    to = out + first_row.to(tl.int64) * pitch
    dequantize_tile(
        tile, packed, absmax, code, outer, nested_code, offset, to, pitch, values,
        K, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, True, "gather", WORDS,
    )  # fmt: skip


@triton.jit
def _extend(
    packed0,
    packed1,
    packed2,
    absmax0,
    absmax1,
    absmax2,
    outer0,
    outer1,
    outer2,
    offset0,
    offset1,
    offset2,
    code,
    nested_code,
    tiles0,
    tiles1,
    tiles2,
    out_e,
    out_b,
    out_a,
    pitch,
    n_total,
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
    K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    if program < tiles0:
        _weight(
            program, packed0, absmax0, outer0, offset0, code, nested_code, out_e, pitch,
            program * 0, n1 * K, K, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, WORDS,
        )  # fmt: skip
    elif program < tiles0 + tiles1:
        _weight(
            program - tiles0, packed1, absmax1, outer1, offset1, code, nested_code, out_e, pitch,
            program * 0 + n1, (n2 - n1) * K, K, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, WORDS,
        )  # fmt: skip
    elif program < tiles0 + tiles1 + tiles2:
        _weight(
            program - tiles0 - tiles1, packed2, absmax2, outer2, offset2, code, nested_code, out_e, pitch,
            program * 0 + n2, (n_total - n2) * K, K, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, WORDS,
        )  # fmt: skip
    else:
        _edges(
            program - tiles0 - tiles1 - tiles2,
            out_b,
            out_a,
            pitch,
            pitch,
            n_total,
            K,
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
            ROWS,
            PADDED,
            WIDTH,
        )


class _Parts:
    """The arguments that describe up to three adapters; what is not there has no rows, no ranks and any pointer."""

    def __init__(
        self,
        views: Sequence[LinearView],
        rows: Sequence[slice],
        ranks: Sequence[slice],
        b_NC: Tensor,
        a_CK: Tensor,
    ) -> None:
        n_total, columns = b_NC.shape
        missing = MOST - len(views)
        loras = [view.lora for view in views]
        firsts = [r.start for r in rows] + [n_total] * missing
        starts = [r.start for r in ranks] + [columns] * missing
        self.b_programs, self.a_blocks = -(-n_total // ROWS), -(-a_CK.shape[1] // WIDTH)
        self.programs = self.b_programs + columns * self.a_blocks
        self.arguments = (
            *[b_NC if lora is None else lora.b_NR for lora in loras],
            *[b_NC] * missing,
            *[a_CK if lora is None else lora.a_RK for lora in loras],
            *[a_CK] * missing,
            *[view.bias for view in views],
            *[None] * missing,
            firsts[1],
            firsts[2],
            starts[1],
            starts[2],
            *[r.stop - r.start for r in ranks],
            *[0] * missing,
            *[0.0 if lora is None or lora.dropout > 0 else lora.scale for lora in loras],
            *[0.0] * missing,
            self.b_programs,
            self.a_blocks,
        )


def _fits(views: Sequence[LinearView]) -> bool:
    """Whether the adapters are few enough, and contiguous, for one launch."""
    return len(views) <= MOST and all(
        v.lora is None or (v.lora.a_RK.is_contiguous() and v.lora.b_NR.is_contiguous())
        for v in views
    )


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
    if not _fits(views):
        reference.fill_columns(views, rows, ranks, b_NC, a_CK, bias_column=bias_column)
        return
    parts = _Parts(views, rows, ranks, b_NC, a_CK)
    _fill[(parts.programs,)](
        b_NC,
        a_CK,
        b_NC.stride(0),
        a_CK.stride(0),
        b_NC.shape[0],
        a_CK.shape[1],
        b_NC.shape[1],
        bias_column,
        *parts.arguments,
        ROWS=ROWS,
        PADDED=triton.next_power_of_2(b_NC.shape[1]),
        WIDTH=WIDTH,
        num_warps=4,
        enable_fp_fusion=False,  # s·A is rounded as the reference rounds it
    )


def extend(
    views: Sequence[LinearView],
    rows: Sequence[slice],
    ranks: Sequence[slice],
    e: Tensor,
    *,
    n: int,
    k: int,
    bias_column: int,
) -> bool:
    """All of E from 4-bit weights and their adapters, in one launch. False where it cannot: then nothing is written.

    e: [N + C, K + C] with C > 0. The weights must share their code tables' kind and block sizes, K a multiple of 8.
    """
    weights = [view.weight for view in views]
    first = weights[0]
    alike = (
        isinstance(first, FourBitWeight)
        and k % 8 == 0
        and first.blocksize % 8 == 0
        and all(
            isinstance(w, FourBitWeight)
            and (w.kind, w.blocksize, w.nested_blocksize, w.nested_absmax is None)
            == (first.kind, first.blocksize, first.nested_blocksize, first.nested_absmax is None)
            and w.packed.data_ptr() % 4 == 0
            for w in weights
        )
    )
    if not alike or not _fits(views) or e.shape[0] == n:
        return False
    assert isinstance(first, FourBitWeight)
    nested = first.nested_absmax is not None
    b_NC, a_CK = e[:n, k:], e[n:, :k]
    parts = _Parts(views, rows, ranks, b_NC, a_CK)
    all_three = [*weights, *[first] * (MOST - len(weights))]
    tiles = [-(-(r.stop - r.start) * k // (WORDS * 8)) for r in rows] + [0] * (MOST - len(rows))
    code = first.code
    _extend[(sum(tiles) + parts.programs,)](
        *[w.packed.view(torch.int32) for w in all_three],
        *[w.absmax for w in all_three],
        *[w.nested_absmax if nested else code for w in all_three],
        *[w.nested_offset if nested else code for w in all_three],
        code,
        first.nested_code if nested else code,
        *tiles,
        e,
        b_NC,
        a_CK,
        e.stride(0),
        n,
        b_NC.shape[1],
        bias_column,
        *parts.arguments,
        K=k,
        BLOCKSIZE=first.blocksize,
        NESTED=nested,
        NESTED_BLOCKSIZE=first.nested_blocksize,
        WORDS=WORDS,
        ROWS=ROWS,
        PADDED=triton.next_power_of_2(b_NC.shape[1]),
        WIDTH=WIDTH,
        num_warps=4,
        enable_fp_fusion=False,  # bitsandbytes rounds the nested product before it adds the offset
    )
    return True
