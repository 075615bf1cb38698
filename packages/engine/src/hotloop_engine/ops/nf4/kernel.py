"""4-bit dequantisation in Triton: one launch, nested absmax included, into rows of any pitch.

A thread reads 8 codes as one 32-bit word and writes 8 values: 16 bytes in a 16-bit dtype, so a warp
writes 512 bytes side by side. That, not wider loads, is what this op needs: it writes four bytes
for each one that it reads, and a thread that read 16 bytes would write runs of 64 bytes, one warp's
stores scattered over 2 KiB. Four to eight independent words per thread keep enough loads in flight.

The table of codes has 16 fp32 entries, 64 bytes, so a warp's lookups fall into 16 different banks
or are broadcast: never a conflict, in shared memory or in L1. Two variants, compared by the
benchmark: "l1" looks up with plain loads, "gather" with `tl.gather`. A select tree costs 15 selects
per value, a budget of about 24 instructions; a table of pairs for each byte is 2 KiB of fp32 (a
16-bit one could not be bit-exact), whose lookups touch up to 16 lines of L1 per warp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import triton
import triton.language as tl

from hotloop_engine.ops.kernel import cdiv, launch

if TYPE_CHECKING:
    from hotloop_core.kernels import FourBitWeight
    from torch import Tensor

WORDS = 1024  # 8 words a thread: 4 KiB read and 16 KiB written by a program
NUM_WARPS = 4

Lookup = Literal["l1", "gather"]


@triton.jit
def _block_scale(
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    block,
    mask,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
):
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        outer = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * outer + tl.load(nested_offset_ptr)
    return scale


@triton.jit
def dequantize_tile(
    tile,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,
    out_pitch,
    values,
    K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    LOOKUP: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Tile number `tile` of W[n, k] = code[packed] * absmax[block]; source: `Dequantize4bit`.

    packed uint8, or int32 words of 8 codes with WHOLE_WORDS (K and BLOCKSIZE multiples of 8, so
    that a word lies in one row and in one block); out rows of `out_pitch` elements. K is a
    constant because the division of every word's index by it is then a multiplication.
    """
    word = tile * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 8)
    if WHOLE_WORDS:
        mask = word < values // 8
        words = tl.load(packed_ptr + word, mask=mask, other=0)
        # A byte's high nibble comes first, so value j of a word lies 4 * (j ^ 1) bits up.
        codes = (words[:, None] >> (4 * (lane ^ 1))[None, :]) & 0xF
        scale = _block_scale(
            absmax_ptr,
            nested_absmax_ptr,
            nested_code_ptr,
            nested_offset_ptr,
            word // (BLOCKSIZE // 8),
            mask,
            NESTED,
            NESTED_BLOCKSIZE,
        )[:, None]
        row = word // (K // 8)
        to = row.to(tl.int64) * out_pitch + (word - row * (K // 8)) * 8
        to = to[:, None] + lane[None, :]
        mask = mask[:, None]
    else:
        value = word.to(tl.int64)[:, None] * 8 + lane[None, :]
        mask = value < values
        byte = tl.load(packed_ptr + value // 2, mask=mask, other=0).to(tl.int32)
        codes = (byte >> (4 * (lane % 2 ^ 1))[None, :]) & 0xF
        scale = _block_scale(
            absmax_ptr,
            nested_absmax_ptr,
            nested_code_ptr,
            nested_offset_ptr,
            value // BLOCKSIZE,
            mask,
            NESTED,
            NESTED_BLOCKSIZE,
        )
        row = value // K
        to = row * out_pitch + (value - row * K)
    if LOOKUP == "gather":
        table = tl.load(code_ptr + tl.arange(0, 16))
        normal = tl.gather(table, tl.reshape(codes, [WORDS * 8]), 0)
        normal = tl.reshape(normal, [WORDS, 8])
    else:
        normal = tl.load(code_ptr + codes)
    tl.store(out_ptr + to, (normal * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,
    out_pitch,
    values,
    K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    LOOKUP: tl.constexpr,
    WORDS: tl.constexpr,
):
    dequantize_tile(
        tl.program_id(0),
        packed_ptr,
        absmax_ptr,
        code_ptr,
        nested_absmax_ptr,
        nested_code_ptr,
        nested_offset_ptr,
        out_ptr,
        out_pitch,
        values,
        K,
        BLOCKSIZE,
        NESTED,
        NESTED_BLOCKSIZE,
        WHOLE_WORDS,
        LOOKUP,
        WORDS,
    )


def forward(weight: FourBitWeight, *, out: Tensor, lookup: Lookup = "gather") -> Tensor:
    """As `Dequantize4bit.forward`. `lookup` names the variant of the table lookup."""
    values, (_, columns) = out.numel(), weight.shape
    if values == 0:
        return out
    nested = weight.nested_absmax is not None
    packed = weight.packed.flatten()
    whole_words = columns % 8 == 0 and weight.blocksize % 8 == 0 and packed.data_ptr() % 4 == 0
    # Single codes take 64-bit places of their own: 64 of them a thread spill 8 KiB, 8 nothing.
    words = WORDS if whole_words else WORDS // 8
    launch(
        _dequantize,
        cdiv(values, words * 8),
        (
            packed.view(torch.int32) if whole_words else packed,
            weight.absmax,
            weight.code,
            weight.nested_absmax if nested else weight.code,
            weight.nested_code if nested else weight.code,
            weight.nested_offset if nested else weight.code,
            out,
            out.stride(0),
            values,
        ),
        {
            "K": columns,
            "BLOCKSIZE": weight.blocksize,
            "NESTED": nested,
            "NESTED_BLOCKSIZE": weight.nested_blocksize,
            "WHOLE_WORDS": whole_words,
            "LOOKUP": lookup,
            "WORDS": words,
        },
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # bitsandbytes rounds the nested product before it adds the offset
    )
    return out
