"""Rotary position embedding in Triton: q and k in one launch, cos and sin read once per token.

Equations, shapes and dtypes as in `reference.py`. A program takes whole heads of a token, so that a
norm over a head is a reduction inside it, and reads all that it overwrites before it writes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from hotloop_core.errors import ConfigError

from hotloop_engine.ops.kernel import partial_sums, require_unit_last, wide

if TYPE_CHECKING:
    from hotloop_core.kernels import HeadNorm
    from torch import Tensor

# Pairs of one tensor that a program holds at once: 32 heads of 128, which is all of most models'.
PAIRS = 2048
# Pairs that a thread holds: 16 are four 16-byte loads of bf16 in flight. The norm's backward reads a
# second tensor and accumulates a weight gradient, which leaves registers for half as many.
PAIRS_PER_THREAD = 16
PAIRS_PER_THREAD_NORM_BACKWARD = 8


@triton.jit
def _load_pair(at, inside, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(x1, x2), each [rows, BLOCK_HALF], of rows that start at the pointers `at` [rows, 1]."""
    if INTERLEAVED:  # one contiguous load, split in registers
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        x = wide(tl.load(at + column, mask=inside & (column < 2 * HALF), other=0.0))
        x1, x2 = tl.split(tl.reshape(x, (at.shape[0], BLOCK_HALF, 2)))
    else:
        column = tl.arange(0, BLOCK_HALF)[None, :]
        inside = inside & (column < HALF)
        x1 = wide(tl.load(at + column, mask=inside, other=0.0))
        x2 = wide(tl.load(at + HALF + column, mask=inside, other=0.0))
    return x1, x2


@triton.jit
def _store_pair(
    at, x1, x2, inside, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        x = tl.reshape(tl.join(x1, x2), (at.shape[0], 2 * BLOCK_HALF))
        tl.store(at + column, x.to(at.dtype.element_ty), mask=inside & (column < 2 * HALF))
    else:
        column = tl.arange(0, BLOCK_HALF)[None, :]
        inside = inside & (column < HALF)
        tl.store(at + column, x1.to(at.dtype.element_ty), mask=inside)
        tl.store(at + HALF + column, x2.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _weight(w_ptr, OFFSET: tl.constexpr, pair):
    """offset + w, for the first and the second of each pair and for what is not rotated."""
    HALF: tl.constexpr = pair[0]
    REST: tl.constexpr = pair[2]
    if w_ptr is None:
        return 1.0, 1.0, 1.0
    else:
        one = tl.full((1, 1), 0, tl.int32)
        w1, w2 = _load_pair(w_ptr + one, one == 0, HALF, pair[1], pair[4])
        column = tl.arange(0, pair[3])[None, :]
        w3 = wide(tl.load(w_ptr + 2 * HALF + column, mask=column < REST, other=0.0))
        return OFFSET + w1, OFFSET + w2, OFFSET + w3


@triton.jit
def _heads(
    in_ptr,
    x_ptr,
    out_ptr,
    weight,
    dw1,
    dw2,
    dw3,
    token,
    table,
    strides,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    COPY: tl.constexpr,
    pair,
    BACKWARD: tl.constexpr,
    LONG: tl.constexpr,
):
    """All heads of one tensor for one token. EPS None: no norm. Returns the sums for dw, grown."""
    HALF: tl.constexpr = pair[0]
    BLOCK_HALF: tl.constexpr = pair[1]
    REST: tl.constexpr = pair[2]
    INTERLEAVED: tl.constexpr = pair[4]
    cos1, sin1, cos2, sin2 = table
    w1, w2, w3 = weight
    column = tl.arange(0, pair[3])[None, :]
    if LONG:
        token = token.to(tl.int64)
    for first in tl.static_range(0, HEADS, BLOCK):
        head = first + tl.arange(0, BLOCK)[:, None]
        inside = head < HEADS
        inside_rest = inside & (column < REST)
        if LONG:
            head = head.to(tl.int64)
        in_at = in_ptr + (token * strides[0] + head * strides[1])
        out_at = out_ptr + (token * strides[2] + head * strides[3])
        y1, y2 = _load_pair(in_at, inside, HALF, BLOCK_HALF, INTERLEAVED)
        if COPY:
            y3 = wide(tl.load(in_at + 2 * HALF + column, mask=inside_rest, other=0.0))
        if EPS is not None:
            if BACKWARD:
                x_at = x_ptr + (token * strides[4] + head * strides[5])
                x1, x2 = _load_pair(x_at, inside, HALF, BLOCK_HALF, INTERLEAVED)
                if COPY:
                    x3 = wide(tl.load(x_at + 2 * HALF + column, mask=inside_rest, other=0.0))
            else:
                x1, x2 = y1, y2
                if COPY:
                    x3 = y3
            square = tl.sum(x1 * x1 + x2 * x2, axis=1)
            if COPY:
                square += tl.sum(x3 * x3, axis=1)
            rstd = tl.rsqrt(square / (2 * HALF + REST) + EPS)[:, None]
            x1 *= rstd
            x2 *= rstd
            if COPY:
                x3 *= rstd
            if not BACKWARD:
                y1 = x1 * w1
                y2 = x2 * w2
                if COPY:
                    y3 = x3 * w3
        y1, y2 = y1 * cos1 - y2 * sin1, y2 * cos2 + y1 * sin2
        if BACKWARD and EPS is not None:
            dw1 += y1 * x1
            dw2 += y2 * x2
            y1 *= w1
            y2 *= w2
            projected = tl.sum(y1 * x1 + y2 * x2, axis=1)
            if COPY:
                dw3 += y3 * x3
                y3 *= w3
                projected += tl.sum(y3 * x3, axis=1)
            projected = projected[:, None] / (2 * HALF + REST)
            y1 = rstd * (y1 - x1 * projected)
            y2 = rstd * (y2 - x2 * projected)
            if COPY:
                y3 = rstd * (y3 - x3 * projected)
        _store_pair(out_at, y1, y2, inside, HALF, BLOCK_HALF, INTERLEAVED)
        if COPY:
            at = out_at + 2 * HALF + column
            tl.store(at, y3.to(out_ptr.dtype.element_ty), mask=inside_rest)
    return dw1, dw2, dw3


@triton.jit
def _store_sums(at, dw1, dw2, dw3, pair):
    """Writes one program's share of a weight gradient [K], summed over its heads."""
    HALF: tl.constexpr = pair[0]
    at += tl.full((1, 1), 0, tl.int32)
    dw1 = tl.sum(dw1, axis=0)[None, :]
    dw2 = tl.sum(dw2, axis=0)[None, :]
    dw3 = tl.sum(dw3, axis=0)[None, :]
    _store_pair(at, dw1, dw2, dw1 == dw1, HALF, pair[1], pair[4])
    column = tl.arange(0, pair[3])[None, :]
    tl.store(at + 2 * HALF + column, dw3, mask=column < pair[2])
