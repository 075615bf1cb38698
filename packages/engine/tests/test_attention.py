"""Every attention backend that runs here, forward and backward, against fp64 truth."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hotloop_engine.attention import Backend, Sequences, choose, request, table
from hotloop_engine.attention.backends import BACKENDS
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers
from torch import Tensor

BY_NAME = {backend.name: backend for backend in BACKENDS}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One batch and one layer's options; `wide` puts q, k, v into columns of one buffer."""

    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    window: int | None = None
    softcap: float | None = None
    wide: int | None = None

    def __str__(self) -> str:
        lengths = "-".join(map(str, self.lengths[:6])) + ("+" if len(self.lengths) > 6 else "")
        options = f"w{self.window}c{self.softcap}p{self.wide}"
        return f"{lengths}/{self.heads}:{self.kv_heads}x{self.head_size}/{options}"


CASES = [
    Case((1,)),
    Case((2,)),
    Case((63,), heads=2),
    Case((48, 48), heads=2, kv_heads=1),
    Case((33, 1, 7, 50), heads=4, kv_heads=1),
    Case((1, 1, 1, 1, 1, 30, 1, 1, 1), heads=2, kv_heads=2, head_size=16),
    Case((65, 31), head_size=80, wide=8),
    Case((40, 17), head_size=96, wide=3),
    Case((35, 5), heads=2, kv_heads=1, head_size=128, wide=64),
    Case((18, 20), heads=2, kv_heads=2, head_size=256),
]
WINDOWED = [
    Case((70,), heads=2, window=1),
    Case((100,), heads=2, kv_heads=1, window=16),
    Case((70, 3, 49), heads=2, kv_heads=1, window=37),
    Case((9, 12), heads=2, window=64),
    Case((66, 70), heads=2, kv_heads=1, softcap=20.0),
    Case((80, 2, 33), heads=2, kv_heads=1, head_size=80, window=33, softcap=5.0, wide=8),
]


def batch(lengths: tuple[int, ...], device: torch.device = CPU) -> Sequences:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
    return Sequences.from_cu_seqlens(offsets, tokens=sum(lengths))


def tensors(case: Case, dtype: torch.dtype, device: torch.device = CPU) -> list[Tensor]:
    """Returns q, k, v (columns of one wide buffer where the case says so) and do."""
    tokens, h, g, k = sum(case.lengths), case.heads, case.kv_heads, case.head_size
    width = (h + 2 * g) * k
    buffer = torch.randn(tokens, width + (case.wide or 0), device=device).to(dtype)
    parts = buffer[:, :width].split([h * k, g * k, g * k], dim=1)
    views = [part.unflatten(1, (-1, k)) for part in parts]
    if case.wide is None:
        views = [view.contiguous() for view in views]
    return [*views, torch.randn(tokens, h, k, device=device).to(dtype)]


def run(backend: Backend, case: Case, inputs: list[Tensor], deterministic: bool = False) -> dict:
    q, k, v, do = inputs
    sequences = batch(case.lengths, q.device)
    options = {
        "scale": case.head_size**-0.5,
        "window": case.window,
        "softcap": case.softcap,
        "deterministic": deterministic,
    }
    o, lse = backend.forward(q, k, v, sequences, **options)
    dq, dk, dv = backend.backward(do, q, k, v, o, lse, sequences, **options)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def eager(case: Case, inputs: list[Tensor]) -> dict[str, Tensor]:
    """As transformers' eager attention computes it: a mask, a softmax in fp32, autograd."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])
    outputs = []
    start = 0
    for length in case.lengths:
        rows = slice(start, start + length)
        repeat = case.heads // case.kv_heads
        qs, ks, vs = (x[rows].transpose(0, 1) for x in (q, k, v))
        ks, vs = ks.repeat_interleave(repeat, 0), vs.repeat_interleave(repeat, 0)
        scores = qs @ ks.mT * case.head_size**-0.5
        if case.softcap is not None:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        i = torch.arange(length, device=q.device)
        hidden = i[None, :] > i[:, None]
        if case.window is not None:
            hidden |= i[:, None] - i[None, :] >= case.window
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        p = scores.softmax(-1, dtype=wide).to(q.dtype)
        outputs.append((p @ vs).transpose(0, 1))
        start += length
    o = torch.cat(outputs)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), inputs[3])
    return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}


def check(backend: Backend, case: Case, inputs: list[Tensor], deterministic: bool = False) -> None:
    truth = eager(case, [x.double() for x in inputs])
    with poisoned_buffers():
        ours = run(backend, case, inputs, deterministic)
    theirs = eager(case, inputs)
    for name in [name for name, exact in truth.items() if not exact.any()]:
        # A token that sees only itself: dq and dk are differences of equal numbers, exactly 0.
        eps = torch.finfo(inputs[0].dtype).eps
        assert ours.pop(name).double().norm() <= 4 * eps * inputs[3].double().norm()
        del theirs[name], truth[name]
    assert_no_worse_than(ours, theirs, truth)


HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float64, torch.float32, *HALF]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *WINDOWED], ids=str)
def test_reference_is_no_worse_than_eager(case: Case, dtype: torch.dtype) -> None:
    check(BY_NAME["reference"], case, tensors(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sdpa_cpu_is_no_worse_than_eager(case: Case, dtype: torch.dtype) -> None:
    check(BY_NAME["sdpa_cpu"], case, tensors(case, dtype))


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU only: Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *WINDOWED], ids=str)
def test_triton_is_no_worse_than_eager_in_the_interpreter(case: Case, dtype: torch.dtype) -> None:
    check(BY_NAME["triton"], case, tensors(case, dtype))
