"""Gated linear units in Triton: every input read once, every output written once.

Equations, shapes and dtypes as in `reference.py`. Rows of any stride: gate and up may lie side by
side in one buffer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from hotloop_engine.ops.kernel import cdiv, launch, require_unit_last, sigmoid, wide

if TYPE_CHECKING:
    from hotloop_core.kernels import Activation
    from torch import Tensor

# A 16-byte load of bf16 from each input for each of 128 threads: small blocks, so that many are
# resident and one computes while another waits for memory; 1,024 divides 14,336, and wastes little
# of 18,944.
BLOCK = 1024
NUM_WARPS = 4

TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
SQRT_HALF = tl.constexpr(0.7071067811865476)
ONE_OVER_SQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) = x p and act'(x) = p + x p', as in `reference.activate`; for a sigmoid p' = p (1 - p) inner'."""
    if ACTIVATION == "silu":
        p = sigmoid(x)
        activated = x * p
        return activated, p + activated * (1 - p)
    elif ACTIVATION == "gelu":
        p = 0.5 * (1 + tl.erf(x * SQRT_HALF))
        slope = tl.exp(-0.5 * x * x) * ONE_OVER_SQRT_2_PI
        return x * p, p + x * slope
    else:
        square = x * x
        p = sigmoid(x * (TWO_SQRT_2_OVER_PI + (TWO_SQRT_2_OVER_PI * 0.044715) * square))
        activated = x * p
        inner = TWO_SQRT_2_OVER_PI + (TWO_SQRT_2_OVER_PI * 3 * 0.044715) * square
        return activated, p + activated * (1 - p) * inner


@triton.jit
def _place(columns, blocks, BLOCK: tl.constexpr):
    """Where a program works: its row, its columns, and which exist. Programs run along rows."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)  # addresses can pass 2**31
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < columns


@triton.jit
def _forward(
    gate_ptr,
    up_ptr,
    h_ptr,
    columns,
    blocks,
    gate_stride,
    up_stride,
    h_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = _place(columns, blocks, BLOCK)
    gate = wide(tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0))
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(gate.dtype)
    activated, _ = activate(gate, ACTIVATION)
    at = h_ptr + row * h_stride + column
    tl.store(at, (activated * up).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dh_ptr,
    gate_ptr,
    up_ptr,
    columns,
    blocks,
    dh_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = _place(columns, blocks, BLOCK)
    dh_at = dh_ptr + row * dh_stride + column
    gate_at = gate_ptr + row * gate_stride + column
    up_at = up_ptr + row * up_stride + column
    gate = wide(tl.load(gate_at, mask=inside, other=0.0))
    up = tl.load(up_at, mask=inside, other=0.0).to(gate.dtype)
    dh = tl.load(dh_at, mask=inside, other=0.0).to(gate.dtype)
    activated, derivative = activate(gate, ACTIVATION)
    tl.store(dh_at, (activated * up).to(dh_ptr.dtype.element_ty), mask=inside)
    tl.store(gate_at, (dh * up * derivative).to(gate_ptr.dtype.element_ty), mask=inside)
    tl.store(up_at, (dh * activated).to(up_ptr.dtype.element_ty), mask=inside)


def forward(
    gate_TI: Tensor, up_TI: Tensor, *, activation: Activation, out: Tensor | None = None
) -> Tensor:
    """Returns h = act(gate) up."""
    T, columns = gate_TI.shape
    h_TI = gate_TI.new_empty(T, columns) if out is None else out
    require_unit_last(gate=gate_TI, up=up_TI, out=h_TI)
    blocks = cdiv(columns, BLOCK)
    if T * blocks:
        launch(
            _forward,
            T * blocks,
            (
                gate_TI,
                up_TI,
                h_TI,
                columns,
                blocks,
                gate_TI.stride(0),
                up_TI.stride(0),
                h_TI.stride(0),
            ),
            {
                "ACTIVATION": activation,
                "BLOCK": BLOCK,
            },
            num_warps=NUM_WARPS,
        )
    return h_TI


def backward_(dh_TI: Tensor, gate_TI: Tensor, up_TI: Tensor, *, activation: Activation) -> None:
    """In place: gate becomes dh up act'(gate), up becomes dh act(gate), dh becomes act(gate) up."""
    T, columns = gate_TI.shape
    require_unit_last(dh=dh_TI, gate=gate_TI, up=up_TI)
    blocks = cdiv(columns, BLOCK)
    if T * blocks:
        launch(
            _backward,
            T * blocks,
            (
                dh_TI,
                gate_TI,
                up_TI,
                columns,
                blocks,
                dh_TI.stride(0),
                gate_TI.stride(0),
                up_TI.stride(0),
            ),
            {
                "ACTIVATION": activation,
                "BLOCK": BLOCK,
            },
            num_warps=NUM_WARPS,
        )
