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

from hotloop_engine.ops._ahead import stages_ahead
from hotloop_engine.ops.kernel import (
    cdiv,
    launch,
    partial_sums,
    power_of_2,
    require_unit_last,
    sum_of_parts,
    wide,
)

if TYPE_CHECKING:
    from hotloop_core.kernels import HeadNorm
    from torch import Tensor


class _Share(NamedTuple):
    """Pairs of one tensor that a program and a thread hold at once."""

    program: int
    thread: int


# 512 pairs are 8 heads of 128, a quarter of most models': four warps with 4 pairs a thread, many of which are resident,
# so that one computes while another waits (2,048 pairs were as fast without norms, a fifth slower with them). A weight
# gradient is summed head upon head over a loop of tokens, whose next loads are on the way meanwhile: larger turns.
SHARE = _Share(512, 4)
SUMMING = _Share(1024, 8)


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
def _weight(
    w_ptr,
    OFFSET: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Returns offset + w, for the first and second of each pair and for what is not rotated."""
    if w_ptr is None:
        return 1.0, 1.0, 1.0
    else:
        one = tl.full((1, 1), 0, tl.int32)
        w1, w2 = _load_pair(w_ptr + one, one == 0, HALF, BLOCK_HALF, INTERLEAVED)
        column = tl.arange(0, BLOCK_REST)[None, :]
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
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    DW: tl.constexpr,
    LONG: tl.constexpr,
):
    """All heads of one tensor for one token. EPS None: no norm. Returns the sums for dw, grown."""
    cos1, sin1, cos2, sin2 = table
    w1, w2, w3 = weight
    column = tl.arange(0, BLOCK_REST)[None, :]
    if LONG:
        token = token.to(tl.int64)
    for first in tl.static_range(0, HEADS, BLOCK):
        head = first + tl.arange(0, BLOCK)[:, None]
        inside = head < HEADS
        inside_rest = inside & (column < REST)
        if LONG:
            head = head.to(tl.int64)
        in_at = in_ptr + (token * strides[0][0] + head * strides[0][1])
        out_at = out_ptr + (token * strides[1][0] + head * strides[1][1])
        y1, y2 = _load_pair(in_at, inside, HALF, BLOCK_HALF, INTERLEAVED)
        if COPY:
            y3 = wide(tl.load(in_at + 2 * HALF + column, mask=inside_rest, other=0.0))
        if EPS is not None:
            if BACKWARD:
                x_at = x_ptr + (token * strides[2][0] + head * strides[2][1])
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
            # Heads that do not exist would give 0 * inf where EPS is 0, and reach the sums for dw.
            rstd = tl.where(inside, tl.rsqrt(square / (2 * HALF + REST) + EPS)[:, None], 0.0)
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
            if DW:
                dw1 += y1 * x1
                dw2 += y2 * x2
            y1 *= w1
            y2 *= w2
            projected = tl.sum(y1 * x1 + y2 * x2, axis=1)
            if COPY:
                if DW:
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
def _store_sums(
    at,
    dw1,
    dw2,
    dw3,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Writes one program's share of a weight gradient [K], summed over its tokens and heads."""
    one = tl.full((1, 1), 0, tl.int32)
    dw1 = tl.sum(dw1, axis=0)[None, :]
    dw2 = tl.sum(dw2, axis=0)[None, :]
    dw3 = tl.sum(dw3, axis=0)[None, :]
    _store_pair(at + one, dw1, dw2, one == 0, HALF, BLOCK_HALF, INTERLEAVED)
    column = tl.arange(0, BLOCK_REST)[None, :]
    tl.store(at + 2 * HALF + column, dw3, mask=column < REST)


@triton.jit
def _rotate(
    q_in_ptr,
    k_in_ptr,
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    wq_ptr,
    wk_ptr,
    dw_ptr,
    T,
    P,
    tokens,
    q_in_token_stride,
    q_in_head_stride,
    k_in_token_stride,
    k_in_head_stride,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    q_out_token_stride,
    q_out_head_stride,
    k_out_token_stride,
    k_out_head_stride,
    cos_stride,
    sin_stride,
    EPS_Q: tl.constexpr,
    EPS_K: tl.constexpr,
    OFFSET_Q: tl.constexpr,
    OFFSET_K: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    COPY_Q: tl.constexpr,
    COPY_K: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    LONG: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`in` is what is rotated: forward's q and k, or their gradients; q and k, forward's inputs."""
    q_strides = (
        (q_in_token_stride, q_in_head_stride),
        (q_out_token_stride, q_out_head_stride),
        (q_token_stride, q_head_stride),
    )
    k_strides = (
        (k_in_token_stride, k_in_head_stride),
        (k_out_token_stride, k_out_head_stride),
        (k_token_stride, k_head_stride),
    )
    DW: tl.constexpr = dw_ptr is not None
    SUM: tl.constexpr = dw_ptr.dtype.element_ty if dw_ptr is not None else tl.float32
    dq1 = tl.zeros((BLOCK_H, BLOCK_HALF), SUM)
    dq2 = tl.zeros((BLOCK_H, BLOCK_HALF), SUM)
    dq3 = tl.zeros((BLOCK_H, BLOCK_REST), SUM)
    dk1 = tl.zeros((BLOCK_G, BLOCK_HALF), SUM)
    dk2 = tl.zeros((BLOCK_G, BLOCK_HALF), SUM)
    dk3 = tl.zeros((BLOCK_G, BLOCK_REST), SUM)
    wq = _weight(wq_ptr, OFFSET_Q, HALF, BLOCK_HALF, REST, BLOCK_REST, INTERLEAVED)
    wk = _weight(wk_ptr, OFFSET_K, HALF, BLOCK_HALF, REST, BLOCK_REST, INTERLEAVED)
    program = tl.program_id(0)
    last = tl.minimum((program + 1) * tokens, T)
    for token in tl.range(program * tokens, last, num_stages=STAGES):
        at = tl.cast(token % P, tl.int64) + tl.zeros((1, 1), tl.int64)
        cos1, cos2 = _load_pair(cos_ptr + at * cos_stride, at >= 0, HALF, BLOCK_HALF, False)
        sin1, sin2 = _load_pair(sin_ptr + at * sin_stride, at >= 0, HALF, BLOCK_HALF, False)
        if INTERLEAVED:
            cos2, sin2 = cos1, sin1
        if BACKWARD:  # the transpose: each meets the other's sine, negated
            sin1, sin2 = -sin2, -sin1
        table = (cos1, sin1, cos2, sin2)
        dq1, dq2, dq3 = _heads(
            *(q_in_ptr, q_ptr, q_out_ptr, wq, dq1, dq2, dq3, token, table, q_strides),
            *(EPS_Q, H, BLOCK_H, COPY_Q, HALF, BLOCK_HALF, REST, BLOCK_REST, INTERLEAVED),
            *(BACKWARD, DW, LONG),
        )
        dk1, dk2, dk3 = _heads(
            *(k_in_ptr, k_ptr, k_out_ptr, wk, dk1, dk2, dk3, token, table, k_strides),
            *(EPS_K, G, BLOCK_G, COPY_K, HALF, BLOCK_HALF, REST, BLOCK_REST, INTERLEAVED),
            *(BACKWARD, DW, LONG),
        )
    if DW:
        at = dw_ptr + program * (2 * (2 * HALF + REST))
        if wq_ptr is not None:
            _store_sums(at, dq1, dq2, dq3, HALF, BLOCK_HALF, REST, BLOCK_REST, INTERLEAVED)
        if wk_ptr is not None:
            _store_sums(
                at + 2 * HALF + REST, dk1, dk2, dk3, HALF, BLOCK_HALF, REST, BLOCK_REST, INTERLEAVED
            )


class _Blocks(NamedTuple):
    """The padded sizes of a launch and its warps."""

    q_heads: int
    k_heads: int
    half: int
    rest: int
    warps: int


@cache
def _blocks(H: int, G: int, half: int, rest: int, share: _Share) -> _Blocks:
    block_half, block_rest = power_of_2(half), power_of_2(rest)
    most_heads = max(1, share.program // max(block_half, block_rest // 2))
    q_heads, k_heads = (min(most_heads, power_of_2(n)) for n in (H, G))
    pairs = max(q_heads, k_heads) * power_of_2(half + rest // 2)
    warps = pairs // (32 * share.thread)
    return _Blocks(q_heads, k_heads, block_half, block_rest, min(8, max(1, warps)))


def _launch(
    ins: tuple[Tensor, Tensor],
    xs: tuple[Tensor | None, Tensor | None],
    outs: tuple[Tensor | None, Tensor | None],
    norms: tuple[HeadNorm | None, HeadNorm | None],
    cos_PR: Tensor,
    sin_PR: Tensor,
    interleaved: bool,
    backward: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rotates both tensors; returns them and, if asked, the norm weights' gradients [2, K]."""
    (q_in, k_in), (q, k), (q_norm, k_norm) = ins, xs, norms
    (T, H, K), G, (P, R) = q_in.shape, k_in.shape[1], cos_PR.shape
    if (
        R % 2
        or not 2 <= R <= K
        or T % max(P, 1)
        or k_in.shape != (T, G, K)
        or sin_PR.shape != cos_PR.shape
    ):
        raise ConfigError(
            f"rope: q {tuple(q_in.shape)}, k {tuple(k_in.shape)}, cos {tuple(cos_PR.shape)}, sin "
            f"{tuple(sin_PR.shape)} do not fit: expected [T, H, K], [T, G, K], [P, R], [P, R], R "
            "even and 2 to K, T a multiple of P."
        )
    q_out, k_out = (
        i.new_empty(i.shape) if o is None else o for i, o in zip(ins, outs, strict=True)
    )
    wq, wk = (None if norm is None else norm.w_K for norm in norms)
    require_unit_last(q=q_in, k=k_in, forward_q=q, forward_k=k, out_q=q_out, out_k=k_out)
    require_unit_last(cos=cos_PR, sin=sin_PR, q_weight=wq, k_weight=wk)
    summing = need_dw and not (wq is None and wk is None)
    blocks = _blocks(H, G, R // 2, K - R, SUMMING if summing else SHARE)
    tokens_each, stages, dw_2K = 1, 1, None
    if summing:
        stages = stages_ahead(2 * (H + G) * K * q_in.element_size())
        tokens_each = max(1, cdiv(T, partial_sums(T, q_in.device)))
        wide_dtype = torch.float64 if q_in.dtype == torch.float64 else torch.float32
        dw_2K = q_in.new_empty(cdiv(T, tokens_each), 2, K, dtype=wide_dtype)
    if T:
        used = [t for t in (q_in, k_in, q, k, q_out, k_out) if t is not None]
        launch(
            _rotate,
            cdiv(T, tokens_each),
            (
                q_in,
                k_in,
                q,
                k,
                q_out,
                k_out,
                cos_PR,
                sin_PR,
                wq,
                wk,
                dw_2K,
                T,
                P,
                tokens_each,
                *q_in.stride()[:2],
                *k_in.stride()[:2],
                *((0, 0) if q is None else q.stride()[:2]),
                *((0, 0) if k is None else k.stride()[:2]),
                *q_out.stride()[:2],
                *k_out.stride()[:2],
                cos_PR.stride(0),
                sin_PR.stride(0),
            ),
            {
                "EPS_Q": None if q_norm is None else q_norm.eps,
                "EPS_K": None if k_norm is None else k_norm.eps,
                "OFFSET_Q": 0.0 if q_norm is None else q_norm.offset,
                "OFFSET_K": 0.0 if k_norm is None else k_norm.offset,
                "H": H,
                "G": G,
                "BLOCK_H": blocks.q_heads,
                "BLOCK_G": blocks.k_heads,
                "COPY_Q": K > R and (q_norm is not None or not _same_place(q_in, q_out)),
                "COPY_K": K > R and (k_norm is not None or not _same_place(k_in, k_out)),
                "HALF": R // 2,
                "BLOCK_HALF": blocks.half,
                "REST": K - R,
                "BLOCK_REST": blocks.rest,
                "INTERLEAVED": interleaved,
                "BACKWARD": backward,
                "LONG": any(_last_element(tensor) >= 2**31 for tensor in used),
                "STAGES": stages,
            },
            num_warps=blocks.warps,
        )
    return q_out, k_out, None if dw_2K is None else sum_of_parts(dw_2K)


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _last_element(x: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def forward(
    q_THK: Tensor,
    k_TGK: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    *,
    interleaved: bool = False,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    out_q: Tensor | None = None,
    out_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (q, k): y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, of the normed heads."""
    q, k, _ = _launch(
        (q_THK, k_TGK),
        (None, None),
        (out_q, out_k),
        (q_norm, k_norm),
        cos_PR,
        sin_PR,
        interleaved,
        backward=False,
        need_dw=False,
    )
    return q, k


def backward(
    dq_THK: Tensor,
    dk_TGK: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    *,
    interleaved: bool = False,
    q_THK: Tensor | None = None,
    k_TGK: Tensor | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    need_dw: bool = False,
    out_q: Tensor | None = None,
    out_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns (dq, dk, dwq, dwk): dx1 = dy1 cos1 + dy2 sin2, dx2 = dy2 cos2 - dy1 sin1, then norms.

    cos1 and sin1 are the columns that y1 uses, cos2 and sin2 those of y2.
    """
    dq, dk, dw_2K = _launch(
        (dq_THK, dk_TGK),
        (None if q_norm is None else q_THK, None if k_norm is None else k_TGK),
        (out_q, out_k),
        (q_norm, k_norm),
        cos_PR,
        sin_PR,
        interleaved,
        backward=True,
        need_dw=need_dw,
    )
    has_dwq = dw_2K is not None and q_norm is not None and q_norm.w_K is not None
    has_dwk = dw_2K is not None and k_norm is not None and k_norm.w_K is not None
    return dq, dk, dw_2K[0] if has_dwq else None, dw_2K[1] if has_dwk else None
