"""Causal attention in Triton: packed, windowed, soft-capped, grouped; one forward and two backward.

Equations   arXiv:2205.14135 algorithms 1 and 4, with a soft cap c on the scores:
    u_ij = scale * q_i . k_j        s_ij = u_ij, or c tanh(u_ij / c)
    p_ij = exp(s_ij - lse_i)        o_i = sum_j p_ij v_j          delta_i = do_i . o_i
    du_ij = p_ij (do_i . v_j - delta_i) (1 - tanh(u_ij / c)^2)
    dq_i = scale sum_j du_ij k_j    dk_j = scale sum_i du_ij q_i  dv_j = sum_i p_ij do_i
Visible: j <= i and i - j < window, both in one sequence. Backward makes dk, dv in one kernel (a
program owns a block of keys and sums over all queries of its group) and dq in another, so each sum
has one owner and one order: no atomics, the same bits every time.

Sequence s starts at tile cu_seqlens[s] // BLOCK + s, which leaves every sequence at least the tiles
that it needs, so the host need not know the lengths; a program finds its sequence by bisection, and
at most one tile per sequence is empty.

Scores are kept in base 2: exp2 is one instruction. lse is natural.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hotloop_engine.ops.kernel import FUSED, INTERPRETED, cdiv, power_of_2

from .interface import unit_stride

if TYPE_CHECKING:
    from .interface import Gradients, Inputs
    from .sequences import Sequences

QUICK_CAP = 1000.0
"""Up to this soft cap 16-bit inputs take the quick tanh, whose error of 1e-7 is multiplied by the cap."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _locate(cu_seqlens, count, tile, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Returns (first token of the sequence, its length, first row of the tile within it)."""
    low = 0
    high = count - 1
    for _ in range(STEPS):  # the last sequence whose first tile is not after this one
        middle = (low + high + 1) // 2
        before = tl.load(cu_seqlens + middle) // BLOCK + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    start = tl.load(cu_seqlens + low)
    length = tl.load(cu_seqlens + low + 1) - start
    row = (tile - (start // BLOCK + low)) * BLOCK
    return start.to(tl.int64), length, row


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """tanh, exact to a few units in the last place, or to 1e-7 of one, at a quarter of the cost.

    A score is the cap times this and enters p by its difference, so the second is what counts: at a
    cap of 50 it moves p by 6e-6 of itself, where 16-bit inputs move it by 4e-3. See `QUICK_CAP`.
    """
    if EXACT:
        square = x * x
        series = x * (
            1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835)))
        )
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        large = (1 - e) / (1 + e)
        return tl.where(square < 0.0625, series, tl.where(x < 0, -large, large))
    else:
        return 1 - 2 / (1 + tl.exp2(x * (2 * LOG2E)))  # exp2 may be infinite: then 1


@triton.jit
def _tile(
    base, rows, columns, stride, LENGTH, K: tl.constexpr, K2: tl.constexpr, CHECK: tl.constexpr
):
    """Rows of one head as a [rows, K2] tile, zero beyond K and, if CHECK, beyond the sequence."""
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if CHECK:
        return tl.load(pointers, mask=(rows[:, None] < LENGTH) & (columns[None, :] < K), other=0.0)
    elif K2 != K:
        return tl.load(pointers, mask=columns[None, :] < K, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _scores(
    u, i, j, scale, cap,
    WINDOW: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Returns scores in base 2, -inf where j is not visible from i, and the cap's derivative."""
    if CAP != "":
        t = _tanh(u * (scale / cap), CAP == "exact")
        s = t * (cap * LOG2E)
        derivative = 1 - t * t
    else:
        s = u * (scale * LOG2E)
        derivative = tl.full(u.shape, 1.0, tl.float32)
    if MASKED:
        visible = j <= i  # which also keeps a query of the sequence from keys past its end
        if WINDOW > 0:
            visible = visible & (i - j < WINDOW)
        s = tl.where(visible, s, float("-inf"))
    return s, derivative


@triton.jit
def _attend(
    q, o, m, total, k_base, v_base, k_stride, v_stride, row, low, high, length, scale, cap,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Folds keys low ... high into the running maximum m, sum of exponentials and output."""
    i = row + tl.arange(0, M)
    columns = tl.arange(0, K2)
    for first in range(low, high, N):
        j = first + tl.arange(0, N)
        k = _tile(k_base, j, columns, k_stride, length, K, K2, MASKED)
        u = tl.dot(q, tl.trans(k), input_precision="ieee")
        s, _ = _scores(u, i[:, None], j[None, :], scale, cap, WINDOW, CAP, MASKED)
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = m_new
        if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(m - shift)
        total = total * decay + tl.sum(p, 1)
        v = _tile(v_base, j, columns, v_stride, length, K, K2, MASKED)
        o = o * decay[:, None]
        o = tl.dot(p.to(v.dtype), v, o, input_precision="ieee")
        m = m_new
    return o, m, total


@triton.jit
def _ranges(row, length, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr):
    """The keys of M queries: the window's edge from low, all visible from full, the diagonal."""
    end = tl.minimum(row + M, length)
    diagonal = row // N * N
    if WINDOW > 0:
        low = tl.maximum(0, row - WINDOW + 1) // N * N
        full = tl.minimum((tl.maximum(0, row + M - WINDOW) + N - 1) // N * N, diagonal)
    else:
        low = diagonal * 0
        full = low
    return low, full, diagonal, end


@triton.jit(do_not_specialize=["count", "tokens"])
def _forward(
    Q, K_, V, OUT, LSE, cu_seqlens, count, tokens,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, scale, cap,
    GROUP: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: M queries of one head."""
    start, length, row = _locate(cu_seqlens, count, tl.program_id(0), M, STEPS)
    if row >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    i = row + tl.arange(0, M)
    columns = tl.arange(0, K2)
    q = _tile(Q + start * q_t + head * q_h, i, columns, q_t, length, K, K2, True)
    k_base = K_ + start * k_t + (head // GROUP) * k_h
    v_base = V + start * v_t + (head // GROUP) * v_h
    low, full, diagonal, end = _ranges(row, length, M, N, WINDOW)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    o = tl.zeros([M, K2], tl.float32)
    if WINDOW > 0:
        o, m, total = _attend(
            q, o, m, total, k_base, v_base, k_t, v_t, row, low, full, length, scale, cap,
            M, N, K, K2, WINDOW, CAP, True,
        )  # fmt: skip
    o, m, total = _attend(
        q, o, m, total, k_base, v_base, k_t, v_t, row, full, diagonal, length, scale, cap,
        M, N, K, K2, WINDOW, CAP, False,
    )  # fmt: skip
    o, m, total = _attend(
        q, o, m, total, k_base, v_base, k_t, v_t, row, diagonal, end, length, scale, cap,
        M, N, K, K2, WINDOW, CAP, True,
    )  # fmt: skip
    inside = i < length
    total = tl.where(inside, total, 1.0)  # rows past the end may have seen no key at all
    m = tl.where(inside, m, 0.0)
    o = o / total[:, None]
    tl.store(LSE + head * tokens + start + i, (m + tl.log2(total)) * LN2, mask=inside)
    pointers = OUT + start * o_t + head * o_h + i[:, None].to(tl.int64) * o_t + columns[None, :]
    tl.store(pointers, o.to(OUT.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < K))


@triton.jit(do_not_specialize=["tokens"])
def _delta(
    DO, OUT, DELTA, tokens, do_t, do_h, o_t, o_h,
    K: tl.constexpr, K2: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The row sums of do * o, fp32."""
    i = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, K2)
    do = _tile(DO + head * do_h, i, columns, do_t, tokens, K, K2, True).to(tl.float32)
    o = _tile(OUT + head * o_h, i, columns, o_t, tokens, K, K2, True).to(tl.float32)
    tl.store(DELTA + head * tokens + i, tl.sum(do * o, 1), mask=i < tokens)


@triton.jit
def _collect_dq(
    dq, q, do, lse, delta, k_base, v_base, k_stride, v_stride, row, low, high, length, scale, cap,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what keys low ... high give to dq / scale."""
    i = row + tl.arange(0, M)
    columns = tl.arange(0, K2)
    for first in range(low, high, N):
        j = first + tl.arange(0, N)
        k = _tile(k_base, j, columns, k_stride, length, K, K2, MASKED)
        v = _tile(v_base, j, columns, v_stride, length, K, K2, MASKED)
        u = tl.dot(q, tl.trans(k), input_precision="ieee")
        s, derivative = _scores(u, i[:, None], j[None, :], scale, cap, WINDOW, CAP, MASKED)
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        du = p * (dp - delta[:, None]) * derivative
        dq = tl.dot(du.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["count", "tokens"])
def _backward_dq(
    Q, K_, V, DO, LSE, DELTA, DQ, cu_seqlens, count, tokens,
    q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h, dq_t, dq_h, scale, cap,
    GROUP: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: dq of M queries of one head."""
    start, length, row = _locate(cu_seqlens, count, tl.program_id(0), M, STEPS)
    if row >= length:
        return
    head = tl.program_id(1).to(tl.int64)
    i = row + tl.arange(0, M)
    inside = i < length
    columns = tl.arange(0, K2)
    q = _tile(Q + start * q_t + head * q_h, i, columns, q_t, length, K, K2, True)
    do = _tile(DO + start * do_t + head * do_h, i, columns, do_t, length, K, K2, True)
    lse = tl.load(LSE + head * tokens + start + i, mask=inside, other=0.0) * LOG2E
    delta = tl.load(DELTA + head * tokens + start + i, mask=inside, other=0.0)
    k_base = K_ + start * k_t + (head // GROUP) * k_h
    v_base = V + start * v_t + (head // GROUP) * v_h
    low, full, diagonal, end = _ranges(row, length, M, N, WINDOW)
    dq = tl.zeros([M, K2], tl.float32)
    if WINDOW > 0:
        dq = _collect_dq(
            dq, q, do, lse, delta, k_base, v_base, k_t, v_t, row, low, full, length, scale, cap,
            M, N, K, K2, WINDOW, CAP, True,
        )  # fmt: skip
    dq = _collect_dq(
        dq, q, do, lse, delta, k_base, v_base, k_t, v_t, row, full, diagonal, length, scale, cap,
        M, N, K, K2, WINDOW, CAP, False,
    )  # fmt: skip
    dq = _collect_dq(
        dq, q, do, lse, delta, k_base, v_base, k_t, v_t, row, diagonal, end, length, scale, cap,
        M, N, K, K2, WINDOW, CAP, True,
    )  # fmt: skip
    pointers = DQ + start * dq_t + head * dq_h + i[:, None].to(tl.int64) * dq_t + columns[None, :]
    dq = (dq * scale).to(DQ.dtype.element_ty)
    tl.store(pointers, dq, mask=inside[:, None] & (columns[None, :] < K))


@triton.jit
def _collect_dkv(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_stride, do_stride,
    row, low, high, length, scale, cap,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what queries low ... high give to dk / scale and dv. Tiles are keys x queries."""
    j = row + tl.arange(0, N)
    columns = tl.arange(0, K2)
    for first in range(low, high, M):
        i = first + tl.arange(0, M)
        q = _tile(q_base, i, columns, q_stride, length, K, K2, MASKED)
        do = _tile(do_base, i, columns, do_stride, length, K, K2, MASKED)
        if MASKED:
            lse = tl.load(lse_base + i, mask=i < length, other=0.0) * LOG2E
            delta = tl.load(delta_base + i, mask=i < length, other=0.0)
        else:
            lse = tl.load(lse_base + i) * LOG2E
            delta = tl.load(delta_base + i)
        u = tl.dot(k, tl.trans(q), input_precision="ieee")
        s, derivative = _scores(u, i[None, :], j[:, None], scale, cap, WINDOW, CAP, MASKED)
        p = tl.exp2(s - lse[None, :])
        if WANT_DV:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        if WANT_DK:
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            du = p * (dp - delta[None, :]) * derivative
            dk = tl.dot(du.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["count", "tokens"])
def _backward_dkv(
    Q, K_, V, DO, LSE, DELTA, DK, DV, cu_seqlens, count, tokens,
    q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h, dk_t, dk_h, dv_t, dv_h, scale, cap,
    GROUP: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, STEPS: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
):  # fmt: skip
    """One program: dk or dv or both of N keys of one head, from every query head of its group."""
    start, length, row = _locate(cu_seqlens, count, tl.program_id(0), N, STEPS)
    if row >= length:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    j = row + tl.arange(0, N)
    columns = tl.arange(0, K2)
    k = _tile(K_ + start * k_t + kv_head * k_h, j, columns, k_t, length, K, K2, True)
    v = _tile(V + start * v_t + kv_head * v_h, j, columns, v_t, length, K, K2, True)
    low = row // M * M
    end = length
    full_end = length // M * M
    if WINDOW > 0:
        end = tl.minimum(length, row + N - 1 + WINDOW)
        full_end = tl.minimum(full_end, (row + WINDOW) // M * M)
    full = tl.minimum((row + N - 1 + M - 1) // M * M, end)  # from here every query sees every key
    full_end = tl.maximum(full, full_end)
    dk = tl.zeros([N, K2] if WANT_DK else [1], tl.float32)
    dv = tl.zeros([N, K2] if WANT_DV else [1], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = Q + start * q_t + head * q_h
        do_base = DO + start * do_t + head * do_h
        lse_base = LSE + head * tokens + start
        delta_base = DELTA + head * tokens + start
        dk, dv = _collect_dkv(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_t, do_t,
            row, low, full, length, scale, cap, M, N, K, K2, WINDOW, CAP,
            WANT_DK, WANT_DV, True,
        )  # fmt: skip
        dk, dv = _collect_dkv(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_t, do_t,
            row, full, full_end, length, scale, cap, M, N, K, K2, WINDOW, CAP,
            WANT_DK, WANT_DV, False,
        )  # fmt: skip
        dk, dv = _collect_dkv(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_t, do_t,
            row, full_end, end, length, scale, cap, M, N, K, K2, WINDOW, CAP,
            WANT_DK, WANT_DV, True,
        )  # fmt: skip
    inside = (j < length)[:, None] & (columns[None, :] < K)
    rows = j[:, None].to(tl.int64)
    if WANT_DK:
        dk_pointers = DK + start * dk_t + kv_head * dk_h + rows * dk_t + columns[None, :]
        tl.store(dk_pointers, (dk * scale).to(DK.dtype.element_ty), mask=inside)
    if WANT_DV:
        dv_pointers = DV + start * dv_t + kv_head * dv_h + rows * dv_t + columns[None, :]
        tl.store(dv_pointers, dv.to(DV.dtype.element_ty), mask=inside)


def attention_forward(inputs: Inputs, o_THK: Tensor) -> Tensor:
    """Writes o_THK, whose last stride is 1 and the others arbitrary; returns lse_HT, fp32."""
    sequences = inputs.sequences
    q_THK, k_TGK, v_TGK = (unit_stride(x) for x in inputs.qkv)
    tokens, heads, head_size = q_THK.shape
    lse_HT = torch.empty(heads, tokens, dtype=torch.float32, device=q_THK.device)
    tile = launches(head_size, q_THK.element_size(), _is_hopper(q_THK.device)).forward
    _forward[_tiles(sequences, tile.queries), heads](
        q_THK, k_TGK, v_TGK, o_THK, lse_HT, sequences.cu_seqlens, sequences.count, tokens,
        *_strides(q_THK, k_TGK, v_TGK, o_THK),
        **_constants(inputs), **tile.arguments(),
    )  # fmt: skip
    return lse_HT


def attention_backward(
    inputs: Inputs, do_THK: Tensor, o_THK: Tensor, lse_HT: Tensor, gradients: Gradients
) -> None:
    """Writes the gradients, last strides 1 and the others arbitrary; lse_HT as forward returned it."""
    sequences = inputs.sequences
    q_THK, k_TGK, v_TGK = (unit_stride(x) for x in inputs.qkv)
    do_THK, o_THK = unit_stride(do_THK), unit_stride(o_THK)
    dq_THK, dk_TGK, dv_TGK = gradients
    tokens, heads, head_size = q_THK.shape
    constants = _constants(inputs)
    delta_HT = torch.empty_like(lse_HT)
    _delta[cdiv(tokens, 64), heads](
        do_THK, o_THK, delta_HT, tokens, *_strides(do_THK, o_THK),
        K=constants["K"], K2=constants["K2"], M=64, **FUSED,
    )  # fmt: skip
    launch = launches(head_size, q_THK.element_size(), _is_hopper(q_THK.device))
    common = (q_THK, k_TGK, v_TGK, do_THK, lse_HT, delta_HT)
    batch = (sequences.cu_seqlens, sequences.count, tokens)
    strides = _strides(q_THK, k_TGK, v_TGK, do_THK)
    for want_dk, want_dv in ((True, False), (False, True)) if launch.apart else ((True, True),):
        _backward_dkv[_tiles(sequences, launch.dkv.keys), k_TGK.shape[1]](
            *common, dk_TGK, dv_TGK, *batch, *strides, *_strides(dk_TGK, dv_TGK), **constants,
            **launch.dkv.arguments(), WANT_DK=want_dk, WANT_DV=want_dv,
        )  # fmt: skip
    _backward_dq[_tiles(sequences, launch.dq.queries), heads](
        *common, dq_THK, *batch, *strides, *_strides(dq_THK), **constants, **launch.dq.arguments()
    )


def _tiles(sequences: Sequences, block: int) -> int:
    return sequences.tokens // block + sequences.count


def _strides(*tensors_TXK: Tensor) -> list[int]:
    return [stride for tensor in tensors_TXK for stride in tensor.stride()[:2]]


def _constants(inputs: Inputs) -> dict[str, int | float | str]:
    (_, heads, head_size), cap = inputs.q_THK.shape, inputs.softcap
    exact = cap is not None and (cap > QUICK_CAP or inputs.q_THK.dtype == torch.float32)
    return {
        "scale": inputs.scale,
        "cap": cap or 1.0,
        "GROUP": heads // inputs.k_TGK.shape[1],
        "K": head_size,
        "K2": max(16, power_of_2(head_size)),
        "WINDOW": inputs.window or 0,
        "CAP": "" if cap is None else "exact" if exact else "quick",
        "STEPS": (inputs.sequences.count - 1).bit_length(),
        **FUSED,
    }


class Tile(NamedTuple):
    """Queries and keys of a tile of scores, and how its kernel runs."""

    queries: int
    keys: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, int]:
        """As the kernels take them."""
        names = ("M", "N", "num_warps", "num_stages")
        return dict(zip(names, self, strict=True))


class Launches(NamedTuple):
    """The tiles of the three kernels. apart: dk and dv in a launch each, which makes the scores once more."""

    forward: Tile
    dkv: Tile
    dq: Tile
    apart: bool = False


@functools.cache
def launches(head_size: int, element_size: int, hopper: bool) -> Launches:
    """Tiles by the size of a head and of its elements.

    Elsewhere than on Hopper at most 99 KB of shared memory, what the small cards have. On Hopper a
    warp group multiplies 64 rows at a time (wgmma): 64 for four warps, 128 for eight; fewer fall
    back to the older instruction, twice as slow. With heads of 256, dk and dv together would take
    all registers of such tiles, so each has its own launch: 5 products instead of 4, of tiles four
    times as tall. Chosen by what Triton makes for sm_90: in the loop over whole tiles 22 to 40
    instructions a score and 2 spilled loads at most (heads of 256, dk and dv together in 32 x 32:
    77). `benchmarks/tune_attention.py` measures others.

    The others are chosen by what Triton 3.6 makes for sm_80 and sm_89, in fp32 for sm_90 too, and
    are not measured: eight warps where four would spill. A thread spills 12 registers at most, but
    for dk and dv of heads of 256 in 16 bits on sm_80: 38 (on sm_89 none).

    Products in full fp32 are unrolled into scalar code that holds whole rows of both operands in
    registers: a tile of 64 x 64 spills hundreds of them and takes a minute to compile.
    """
    if INTERPRETED:  # several tiles and both kinds of edge at small sizes
        small = Tile(32, 16, 4, 1)
        return Launches(small, small, small, apart=head_size >= 128)
    if element_size == 4:
        queries, keys = (32, 32) if head_size <= 64 else (32, 16) if head_size <= 128 else (16, 16)
        tile = Tile(queries, keys, 8, 2)
        return Launches(tile, tile, tile)
    if hopper:
        if head_size <= 64:
            return Launches(Tile(128, 64, 8, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2))
        if head_size <= 128:
            return Launches(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(64, 64, 4, 2))
        tall = Tile(32, 128, 8, 2)
        return Launches(Tile(128, 64, 8, 2), tall, Tile(128, 32, 8, 2), apart=True)
    if head_size <= 128:
        forward = Tile(128, 64 if head_size <= 64 else 32, 8, 2)
        return Launches(forward, Tile(32, 64, 8, 2), Tile(64, 64, 8, 2))
    return Launches(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 4, 2))


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
