"""Cross entropy of the rows of a tile of logits, and its gradient in place, in Triton.

One program per row, two passes over it. The first keeps a running maximum and a running sum in
each lane and meets the other lanes only once, at the end: no barrier in the loop, so warps stream
on their own, and one exponential per logit, because of exp(old - new) and exp(z - new) one is
always 1. The second pass writes the gradient, from the row's end to its start: what was read last
is what the L2 cache still holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from hotloop_core.errors import UnsupportedError
from hotloop_core.kernels import RowStatistics

from hotloop_engine.ops.kernel import FUSED, cdiv, exp, reciprocal

if TYPE_CHECKING:
    from hotloop_core.kernels import HeadLossOptions
    from torch import Tensor

BLOCK = 4096  # 8 logits a thread, one 16-byte load in 16 bit
NUM_WARPS = 16  # with at most 64 registers a thread: two rows at once on a multiprocessor
SCALE_BLOCK = 2048

LOWEST = tl.constexpr(-1.0e38)  # finite: inf - inf is NaN; and no overflow in exp

BOUND = 36.0
"""A soft cap up to here needs no running maximum: e^2z, summed over ten million logits, is a normal fp32 number."""


@triton.jit
def _z_and_slope(logits, slope, inner, outer, SOFTCAP: tl.constexpr):
    """Returns z = outer tanh(inner logits), or slope logits, and dz / dlogits."""
    EXACT: tl.constexpr = logits.dtype == tl.float32
    logits = logits.to(tl.float32)
    if SOFTCAP and EXACT:
        x = logits * inner
        size = tl.abs(x)
        fade = exp(-2 * size)
        # Near zero 1 - exp(-2|x|) cancels, and the series of tanh takes over (next: x^11 / 113).
        square = x * x
        series = 1 + square * (
            -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))
        )
        far = (1 - fade) * reciprocal(1 + fade)
        bent = tl.where(size < 0.25, x * series, tl.where(x < 0, -far, far))
        return bent * outer, slope * (1 - bent * bent)
    elif SOFTCAP:
        # tanh off by 3e-7 at most, near zero as well: little beside what 16-bit logits are off by.
        rest = reciprocal(1 + tl.exp2(logits * (inner * 2.8853900817779268)))  # (1 - tanh x) / 2
        return outer - (2 * outer) * rest, (4 * slope) * (rest - rest * rest)
    else:
        return logits * slope, slope


@triton.jit
def _write_gradient(
    logits_ptr,
    label,
    lse,
    entropy,
    dloss,
    dlog_prob,
    dentropy,
    V,
    slope,
    inner,
    outer,
    smoothing,
    z_loss,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes dz = alpha p - beta onehot - gamma - dH p (log p + H), as in derivation.md."""
    alpha = dloss * (1 + 2 * z_loss * lse) - dlog_prob
    beta = dloss * (1 - smoothing) - dlog_prob
    gamma = dloss * smoothing / V
    last = (tl.cdiv(V, BLOCK) - 1) * BLOCK
    for back in range(0, V, BLOCK):
        v = last - back + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + v, mask=v < V, other=0.0)
        z, dz = _z_and_slope(logits, slope, inner, outer, SOFTCAP)
        log_p = z - lse
        p = exp(log_p)
        g = alpha * p - gamma
        if ENTROPY:
            g -= dentropy * p * (tl.maximum(log_p, LOWEST) + entropy)
        g = tl.where(v == label, g - beta, g)
        # Written lines leave the cache first: the logits that are still to be read again stay.
        tl.store(
            logits_ptr + v,
            (g * dz).to(logits_ptr.dtype.element_ty),
            mask=v < V,
            eviction_policy="evict_first",
        )


@triton.jit
def _forward(
    logits_ptr,
    labels_ptr,
    loss_ptr,
    log_prob_ptr,
    lse_ptr,
    entropy_ptr,
    moments_ptr,
    top1_ptr,
    dloss_ptr,
    dloss_stride,
    pitch,
    V,
    slope,
    inner,
    outer,
    smoothing,
    z_loss,
    SOFTCAP: tl.constexpr,
    BOUNDED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ENTROPY: tl.constexpr,
    MOMENTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of the equations at `CrossEntropyRows`. Statistics and dloss in fp32.

    logits bf16, fp16 or fp32, rows of `pitch` elements; labels int64. A label outside the
    vocabulary reads nothing and makes the row's loss NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * pitch
    label = tl.load(labels_ptr + row)
    known = (label >= 0) & (label < V)
    at_label = tl.load(logits_ptr + label, mask=known, other=float("nan"))
    label = tl.where(known, label, -1).to(tl.int32)
    z_label, _ = _z_and_slope(at_label, slope, inner, outer, SOFTCAP)

    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)  # sum of exp(z - peak), or BOUNDED exp(z), lane by lane
    weighted = tl.zeros((BLOCK,), tl.float32)  # sum of the same times z
    squares = tl.zeros((BLOCK,), tl.float32)  # sum of its squares
    plain = tl.zeros((BLOCK,), tl.float32)  # sum of z
    peak_at = tl.zeros((BLOCK,), tl.int32)  # the block in which a lane first met its peak
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + v, mask=v < V, other=0.0)
        z, _dz = _z_and_slope(logits, slope, inner, outer, SOFTCAP)
        z = tl.where(v < V, z, float("-inf"))
        rises = z > peak
        if BOUNDED:
            old, new = 1.0, exp(z)
        else:
            fade = exp(-tl.abs(z - peak))
            old, new = tl.where(rises, fade, 1.0), tl.where(rises, 1.0, fade)
        total = total * old + new
        if ENTROPY:
            share = tl.where(z > LOWEST, z, 0.0)  # 0 log 0 = 0
            weighted = weighted * old + new * share
        if MOMENTS:
            squares = squares * (old * old) + new * new
        if SMOOTHING or MOMENTS:
            plain += tl.where(v < V, z, 0.0)
        peak = tl.where(rises, z, peak)
        peak_at = tl.where(rises, start, peak_at)

    row_peak = tl.max(peak, 0)
    fade, above = exp(peak - row_peak), row_peak
    if BOUNDED:
        fade, above = 1.0, 0.0
    row_total = tl.sum(total * fade, 0)
    lse = above + tl.log(row_total)
    log_prob = z_label - lse
    nll = -log_prob
    if SMOOTHING:
        nll = (1 - smoothing) * nll - smoothing * (tl.sum(plain, 0) / V - lse)
    tl.store(loss_ptr + row, nll + z_loss * lse * lse)
    tl.store(log_prob_ptr + row, log_prob)
    tl.store(lse_ptr + row, lse)
    first = tl.min(tl.where(peak == row_peak, peak_at + tl.arange(0, BLOCK), V), 0)
    tl.store(top1_ptr + row, (first == label).to(tl.uint8))
    if ENTROPY:
        tl.store(entropy_ptr + row, lse - tl.sum(weighted * fade, 0) / row_total)
    if MOMENTS:
        tl.store(moments_ptr + row, tl.sum(plain, 0) / V)
        collision = tl.log(tl.sum(squares * fade * fade, 0)) - 2 * tl.log(row_total)
        tl.store(moments_ptr + tl.num_programs(0) + row, collision)
    if GRADIENT:
        _write_gradient(
            logits_ptr,
            label,
            lse,
            0.0,
            tl.load(dloss_ptr + row * dloss_stride),
            0.0,
            0.0,
            V,
            slope,
            inner,
            outer,
            smoothing,
            z_loss,
            SOFTCAP,
            False,
            BLOCK,
        )


@triton.jit
def _backward(
    logits_ptr,
    labels_ptr,
    lse_ptr,
    entropy_ptr,
    dloss_ptr,
    dlog_prob_ptr,
    dentropy_ptr,
    dloss_stride,
    dlog_prob_stride,
    dentropy_stride,
    pitch,
    V,
    slope,
    inner,
    outer,
    smoothing,
    z_loss,
    SOFTCAP: tl.constexpr,
    LOSS: tl.constexpr,
    LOG_PROB: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row; statistics and incoming gradients in fp32, each of any stride."""
    row = tl.program_id(0).to(tl.int64)
    dloss = 0.0
    dlog_prob = 0.0
    dentropy = 0.0
    entropy = 0.0
    if LOSS:
        dloss = tl.load(dloss_ptr + row * dloss_stride)
    if LOG_PROB:
        dlog_prob = tl.load(dlog_prob_ptr + row * dlog_prob_stride)
    if ENTROPY:
        dentropy = tl.load(dentropy_ptr + row * dentropy_stride)
        entropy = tl.load(entropy_ptr + row)
    _write_gradient(
        logits_ptr + row * pitch,
        tl.load(labels_ptr + row).to(tl.int32),
        tl.load(lse_ptr + row),
        entropy,
        dloss,
        dlog_prob,
        dentropy,
        V,
        slope,
        inner,
        outer,
        smoothing,
        z_loss,
        SOFTCAP,
        ENTROPY,
        BLOCK,
    )


@triton.jit
def _scale_rows(g_ptr, factor_ptr, pitch, factor_stride, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    to = g_ptr + row * pitch + d
    factor = tl.load(factor_ptr + row * factor_stride)
    g = tl.load(to, mask=d < D, other=0.0).to(tl.float32) * factor
    tl.store(to, g.to(g_ptr.dtype.element_ty), mask=d < D)


def forward_(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    options: HeadLossOptions,
    dloss_T: Tensor | None,
    want_entropy: bool,
    moments_2T: Tensor | None = None,
) -> RowStatistics:
    """As `CrossEntropyRows.forward_`; bf16, fp16 and fp32.

    moments_2T: contiguous, fp32; filled with the mean of z and log sum p^2 of each row.
    """
    _refuse_fp64(logits_TV)
    rows, vocabulary = logits_TV.shape
    numbers = _numbers(options)
    loss, log_prob, lse, entropy = torch.empty(
        4, rows, dtype=torch.float32, device=logits_TV.device
    ).unbind()
    top1 = torch.empty(rows, dtype=torch.bool, device=logits_TV.device)
    if rows:
        _forward[(rows,)](
            logits_TV,
            labels_T.contiguous(),
            loss,
            log_prob,
            lse,
            entropy,
            lse if moments_2T is None else moments_2T,
            top1.view(torch.uint8),
            lse if dloss_T is None else dloss_T,
            0 if dloss_T is None else dloss_T.stride(0),
            logits_TV.stride(0),
            vocabulary,
            *numbers,
            SOFTCAP=options.softcap is not None,
            BOUNDED=options.softcap is not None and abs(numbers[2]) <= BOUND,
            SMOOTHING=options.label_smoothing != 0,
            ENTROPY=want_entropy,
            MOMENTS=moments_2T is not None,
            GRADIENT=dloss_T is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            **FUSED,
        )
    return RowStatistics(
        loss_T=loss,
        log_prob_T=log_prob,
        lse_T=lse,
        is_top1_T=top1,
        entropy_T=entropy if want_entropy else None,
    )


def backward_(
    logits_TV: Tensor,
    labels_T: Tensor,
    lse_T: Tensor,
    entropy_T: Tensor | None,
    *,
    options: HeadLossOptions,
    dloss_T: Tensor | None,
    dlog_prob_T: Tensor | None,
    dentropy_T: Tensor | None,
) -> None:
    """As `CrossEntropyRows.backward_`; bf16, fp16 and fp32."""
    _refuse_fp64(logits_TV)
    rows, vocabulary = logits_TV.shape
    incoming = (dloss_T, dlog_prob_T, dentropy_T)
    if rows:
        _backward[(rows,)](
            logits_TV,
            labels_T.contiguous(),
            lse_T.contiguous(),
            lse_T if entropy_T is None else entropy_T.contiguous(),
            *(lse_T if gradient is None else gradient for gradient in incoming),
            *(0 if gradient is None else gradient.stride(0) for gradient in incoming),
            logits_TV.stride(0),
            vocabulary,
            *_numbers(options),
            SOFTCAP=options.softcap is not None,
            LOSS=dloss_T is not None,
            LOG_PROB=dlog_prob_T is not None,
            ENTROPY=dentropy_T is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            **FUSED,
        )


def scale_rows_(g_TD: Tensor, factor_T: Tensor) -> None:
    """As `CrossEntropyRows.scale_rows_`; bf16, fp16 and fp32."""
    _refuse_fp64(g_TD)
    rows, size = g_TD.shape
    if g_TD.numel():
        _scale_rows[(rows, cdiv(size, SCALE_BLOCK))](
            g_TD, factor_T, g_TD.stride(0), factor_T.stride(0), size, BLOCK=SCALE_BLOCK, **FUSED
        )


def _numbers(options: HeadLossOptions) -> tuple[float, float, float, float, float]:
    """slope, inner, outer, smoothing and z_loss, as the kernels take them."""
    softcap = options.softcap or 1.0
    return (
        options.scale / options.temperature,
        options.scale / softcap,
        softcap / options.temperature,
        options.label_smoothing,
        options.z_loss,
    )


def _refuse_fp64(tensor: Tensor) -> None:
    if tensor.dtype == torch.float64:
        raise UnsupportedError(
            "the Triton kernels of linear_cross_entropy compute in fp32, found fp64; pass "
            'impl="reference", or 16-bit or fp32 tensors.'
        )
