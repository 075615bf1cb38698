"""E in one launch: 4-bit weights dequantised into it, and the adapters beside them, for up to three projections.

Launches cost the host more than these small pieces cost the device, so q, k, v and their adapters are one kernel: the
first programs dequantise a tile of a weight each, the next write B, the last write A.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from hotloop_core.kernels import FourBitWeight
from torch import Tensor

from hotloop_engine.ops.kernel import NOTHING, cdiv, launch, power_of_2, resolve
from hotloop_engine.ops.nf4.kernel import WORDS, dequantize_tile

from . import reference

if TYPE_CHECKING:
    from .group import LinearGroup

ROWS = 64  # of B a program
COLUMNS = 64  # of B at a turn: 32 values a thread; ranks of 256 have up to 1,024, which would spill at once
WIDTH = 1024  # columns of A a program: one row of A, 16-byte accesses with 4 warps
MOST = 3  # q, k, v; a larger group takes the reference, whose launches are many but small


@triton.jit
def _tile_b(tile, b_ptr, bias_ptr, n, c, first_n, last_n, first_c, rank, bias_column):
    """`tile` with one projection's B, and its bias, put in."""
    row, column = (n - first_n)[:, None], (c - first_c)[None, :]
    mine = (n >= first_n)[:, None] & (n < last_n)[:, None]
    inside = mine & (column >= 0) & (column < rank)
    tile = tl.where(
        inside, tl.load(b_ptr + row * rank + column, mask=inside, other=0.0).to(tl.float32), tile
    )
    if bias_ptr is not None:
        at_bias = mine & (c == bias_column)[None, :]
        bias = tl.load(bias_ptr + row + 0 * column, mask=at_bias, other=0.0).to(tl.float32)
        tile = tl.where(at_bias, bias, tile)
    return tile


@triton.jit
def _line_a(line, a_ptr, c, k, k_total, first_c, rank, scale):
    """`line`, row c of the group's A, where it belongs to this projection."""
    mine = (c >= first_c) & (c < first_c + rank)
    inside = mine & (k < k_total)
    a = tl.load(a_ptr + (c - first_c) * k_total + k, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, a * scale, line)


@triton.jit
def _edges(
    program, out_b, out_a, b_pitch, a_pitch, k_total, columns, bias_column,
    b, a, bias, n_bounds, c_starts, ranks, scales, b_programs, a_blocks,
    ROWS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program's share of B (the first `b_programs`) or of A.

    b, a, bias, c_starts, ranks, scales: of three projections. n_bounds: where their rows start, and all rows.
    """
    if program < b_programs:
        n = program * ROWS + tl.arange(0, ROWS)
        for first in tl.range(0, PADDED, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            tile = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for i in tl.static_range(3):
                tile = _tile_b(
                    tile, b[i], bias[i], n, column, n_bounds[i], n_bounds[i + 1],
                    c_starts[i], ranks[i], bias_column,
                )  # fmt: skip
            inside = (n < n_bounds[3])[:, None] & (column < columns)[None, :]
            to_b = out_b + n[:, None].to(tl.int64) * b_pitch + column[None, :]
            tl.store(to_b, tile.to(out_b.dtype.element_ty), mask=inside)
    else:
        row = (program - b_programs) // a_blocks
        k = ((program - b_programs) % a_blocks) * WIDTH + tl.arange(0, WIDTH)
        c = row + tl.zeros_like(k)
        line = tl.zeros((WIDTH,), dtype=tl.float32)
        for i in tl.static_range(3):
            line = _line_a(line, a[i], c, k, k_total, c_starts[i], ranks[i], scales[i])
        to_a = out_a + row.to(tl.int64) * a_pitch + k
        tl.store(to_a, line.to(out_a.dtype.element_ty), mask=k < k_total)


@triton.jit
def _fill(
    n_total, k_total, columns, bias_column, n1, n2, c1, c2, r0, r1, r2,
    scale0, scale1, scale2, b_programs, a_blocks, b0, b1, b2, a0, a1, a2, bias0, bias1, bias2,
    out_b, out_a, b_pitch, a_pitch,
    ROWS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    _edges(
        tl.program_id(0), out_b, out_a, b_pitch, a_pitch, k_total, columns, bias_column,
        (b0, b1, b2), (a0, a1, a2), (bias0, bias1, bias2), (0, n1, n2, n_total), (0, c1, c2),
        (r0, r1, r2), (scale0, scale1, scale2), b_programs, a_blocks, ROWS, PADDED, COLUMNS, WIDTH,
    )  # fmt: skip


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
    packed0, packed1, packed2, absmax0, absmax1, absmax2, outer0, outer1, outer2,
    offset0, offset1, offset2, code, nested_code, tiles0, tiles1, tiles2,
    n_total, k_total, columns, bias_column, n1, n2, c1, c2, r0, r1, r2,
    scale0, scale1, scale2, b_programs, a_blocks, b0, b1, b2, a0, a1, a2, bias0, bias1, bias2,
    out_e, pitch,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
            program - tiles0 - tiles1 - tiles2, out_e + K, out_e + n_total.to(tl.int64) * pitch, pitch, pitch,
            K, columns, bias_column,
            (b0, b1, b2), (a0, a1, a2), (bias0, bias1, bias2), (0, n1, n2, n_total), (0, c1, c2),
            (r0, r1, r2), (scale0, scale1, scale2), b_programs, a_blocks, ROWS, PADDED, COLUMNS, WIDTH,
        )  # fmt: skip


class _Launch:
    """One of the kernels for one group, with all arguments but the last few looked up once for all steps."""

    def __init__(
        self,
        kernel: object,
        programs: int,
        first: tuple[object, ...],
        adapters: tuple[Tensor | None, ...],
        constants: dict[str, object],
    ) -> None:
        self._kernel, self._programs, self._constants = kernel, programs, constants
        self._arguments = (*first, *adapters)
        self._movable = [t for t in adapters if t is not None]
        self._addresses: list[int] = []
        self._resolved = NOTHING

    def __call__(self, *last: object) -> None:
        addresses = list(map(Tensor.data_ptr, self._movable))
        if addresses != self._addresses:  # somebody gave a parameter other memory (`.data = ...`)
            self._addresses, self._resolved = addresses, resolve(self._arguments)
        launch(
            self._kernel,
            self._programs,
            last,
            self._constants,
            before=self._resolved,
            num_warps=4,
            enable_fp_fusion=False,  # rounded as bitsandbytes rounds its absmax, and the reference s·A
        )


class _Prepared:
    """The launches for a group: `fill` of the adapters alone, `extend` of all of E; None where the kernel cannot.

    A projection that is not there has no rows and no ranks; any pointer stands for what is never read.
    """

    def __init__(self, group: LinearGroup) -> None:
        views, loras = group.views, [view.lora for view in group.views]
        missing = MOST - len(views)
        self.fill = self.extend = None
        plain = all(
            lora is None or (lora.a_RK.is_contiguous() and lora.b_NR.is_contiguous())
            for lora in loras
        )
        # They multiply s and A in fp32.
        if missing < 0 or not plain or group.dtype == torch.float64:
            return
        firsts = [r.start for r in group.rows] + [group.n] * missing
        starts = [r.start for r in group.ranks] + [group.columns] * missing
        any_tensor = next(t for t in (*group.tensors(), *_packed(group)) if t is not None)
        padded = power_of_2(group.columns)
        constants: dict[str, object] = {
            "ROWS": ROWS, "PADDED": padded, "COLUMNS": min(COLUMNS, padded), "WIDTH": WIDTH,
        }  # fmt: skip
        b_programs, a_blocks = cdiv(group.n, ROWS), cdiv(group.k, WIDTH)
        programs = b_programs + group.columns * a_blocks
        sizes = (
            group.n,
            group.k,
            group.columns,
            group.rank,
            firsts[1],
            firsts[2],
            starts[1],
            starts[2],
            *[r.stop - r.start for r in group.ranks],
            *[0] * missing,
            *[0.0 if lora is None or lora.dropout > 0 else lora.scale for lora in loras],
            *[0.0] * missing,
            b_programs,
            a_blocks,
        )
        adapters = (
            *[any_tensor if lora is None else lora.b_NR for lora in loras],
            *[any_tensor] * missing,
            *[any_tensor if lora is None else lora.a_RK for lora in loras],
            *[any_tensor] * missing,
            *[view.bias for view in views],
            *[None] * missing,
        )
        self.fill = _Launch(_fill, programs, sizes, adapters, constants)
        weights = _four_bit(group)
        if weights is not None and group.columns:
            self.extend = _Launch(
                _extend,
                weights.tiles + programs,
                (*weights.arguments, *sizes),
                adapters,
                {**weights.constants, **constants},
            )


class _FourBit(NamedTuple):
    """tiles: programs for the weights. arguments, constants: the kernel's first ones."""

    tiles: int
    arguments: tuple[object, ...]
    constants: dict[str, object]


def _packed(group: LinearGroup) -> list[Tensor]:
    return [view.weight.packed for view in group.views if isinstance(view.weight, FourBitWeight)]


def _four_bit(group: LinearGroup) -> _FourBit | None:
    """What `_extend` needs of the weights.

    None where they are not 4-bit, not alike or not whole words, or where N * K passes the kernel's 32 bits.
    """
    weights = [view.weight for view in group.views]
    first = weights[0]
    if not isinstance(first, FourBitWeight) or group.k % 8 or first.blocksize % 8:
        return None
    if max(view.shape[0] for view in group.views) * group.k >= 2**31:
        return None
    nested = first.nested_absmax is not None
    kind = (first.kind, first.blocksize, first.nested_blocksize, nested)
    for weight in weights:
        if not isinstance(weight, FourBitWeight) or weight.packed.data_ptr() % 4:
            return None
        if kind != (
            weight.kind,
            weight.blocksize,
            weight.nested_blocksize,
            weight.nested_absmax is not None,
        ):
            return None
    three = [*weights, *[first] * (MOST - len(weights))]
    sizes = [cdiv((r.stop - r.start) * group.k, WORDS * 8) for r in group.rows]
    tiles = [*sizes, *[0] * (MOST - len(sizes))]
    code = first.code
    arguments = (
        *[w.packed.flatten().view(torch.int32) for w in three],
        *[w.absmax for w in three],
        *[w.nested_absmax if nested else code for w in three],
        *[w.nested_offset if nested else code for w in three],
        code,
        first.nested_code if nested else code,
        *tiles,
    )
    constants: dict[str, object] = {
        "K": group.k,
        "BLOCKSIZE": first.blocksize,
        "NESTED": nested,
        "NESTED_BLOCKSIZE": first.nested_blocksize,
        "WORDS": WORDS,
    }
    return _FourBit(sum(tiles), arguments, constants)


def _prepared(group: LinearGroup) -> _Prepared:
    known = group.prepared.get("lora_linear")
    if not isinstance(known, _Prepared):
        group.prepared["lora_linear"] = known = _Prepared(group)
    return known


def fill_columns(group: LinearGroup, b_NC: Tensor, a_CK: Tensor) -> None:
    """As `reference.fill_columns`; adapters of up to three projections, contiguous, in one launch."""
    fill = _prepared(group).fill
    if fill is None:
        reference.fill_columns(group, b_NC, a_CK)
    else:
        fill(b_NC, a_CK, b_NC.stride(0), a_CK.stride(0))


def extend(group: LinearGroup, e: Tensor) -> bool:
    """All of E from 4-bit weights and their adapters, in one launch. False where it cannot: then nothing is written.

    e: [N + C, K + C] with C > 0. The weights must share their kind and block sizes, K must be a multiple of 8.
    """
    from_weights = _prepared(group).extend
    if from_weights is None:
        return False
    from_weights(e, e.stride(0))
    return True
