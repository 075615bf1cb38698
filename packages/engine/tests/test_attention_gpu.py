"""Every attention backend of this card against fp64 truth, in the dtypes that it is used in."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import accumulate, product

import pytest
import torch
from hotloop_engine.attention import Backend, Request, Sequences, choose, request, table
from hotloop_engine.attention.backends import BACKENDS
from hotloop_engine.attention.reference import Reference
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

ON_CUDA = [b for b in BACKENDS if "cuda" in b.capability.devices and b.name != "reference"]
CUDA = torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMPILED = frozenset({"fa4", "triton"})
"""They compile, for seconds, for each dtype, head size, group, cap and kind of window (ours also for each power of two
that the number of sequences passes): they meet a case in its own `dtypes`, fast or deterministic as it says. The
others are libraries, and meet it in every way."""


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    heads: int = 8
    kv_heads: int = 2
    head_size: int = 128
    window: int | None = None
    softcap: float | None = None
    extra: int = 64  # columns beside q, k and v in their buffer
    dtypes: tuple[torch.dtype, ...] = (BF16,)
    deterministic: bool = False

    @property
    def options(self) -> dict:
        scale = self.head_size**-0.5
        return {"scale": scale, "window": self.window, "softcap": self.softcap}

    def asked(self, dtype: torch.dtype, deterministic: bool) -> Request:
        return Request(
            dtype=dtype,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            packed=len(set(self.lengths)) > 1,
            window=self.window if (self.window or 0) < max(self.lengths) else None,
            softcap=self.softcap,
            deterministic=deterministic,
        )

    def __str__(self) -> str:
        lengths = "-".join(map(str, self.lengths[:5])) + ("+" if len(self.lengths) > 5 else "")
        options = f"w{self.window or ''}c{self.softcap or ''}"
        return f"{lengths}/{self.heads}:{self.kv_heads}x{self.head_size}/{options}"


CASES = [
    Case((320,) * 5),
    Case((1000, 37, 1, 300, 63), deterministic=True),
    Case((900, 200, 1, 30, 5), window=1000),  # which no sequence outgrows
    Case((333,) * 5, heads=4, head_size=64, extra=0),
    Case((1023,), heads=4, kv_heads=4, head_size=80, dtypes=(FP32,), deterministic=True),
    # A pitch that no vector load can take.
    Case((1,) * 200 + (700,), head_size=64, extra=3, dtypes=(FP16,), deterministic=True),
    Case((257, 130), head_size=96, heads=6, kv_heads=3, dtypes=(FP16,)),
    Case((400, 129), head_size=256, heads=4, kv_heads=1),
    Case((900, 200), window=128, deterministic=True),
    Case((640, 640), softcap=50.0, dtypes=(FP16,)),
    Case(
        (1500, 90),
        softcap=50.0,
        window=333,
        head_size=256,
        heads=4,
        dtypes=(BF16, FP32),
        deterministic=True,
    ),
]


def meetings() -> list:
    """(backend, case, dtype, deterministic): every one that the backend's capability admits."""
    found = []
    for backend, case in product(ON_CUDA, CASES):
        if backend.name in COMPILED:
            ways = product(case.dtypes, (case.deterministic,))
        else:
            ways = product((BF16, FP16, FP32), (False, True))
        for dtype, deterministic in ways:
            if backend.capability.refusal(case.asked(dtype, deterministic)) is None:
                kind = "deterministic" if deterministic else "fast"
                name = f"{backend.name}-{case}-{str(dtype).removeprefix('torch.')}-{kind}"
                found.append(pytest.param(backend, case, dtype, deterministic, id=name))
    return found


MEETINGS = meetings()


def able(backend: Backend, case: Case, dtype: torch.dtype, deterministic: bool) -> None:
    if reason := backend.refusal(case.asked(dtype, deterministic), CUDA):
        pytest.skip(f"{backend.name}: {reason}")


@functools.cache
def tensors(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, columns of one buffer, and do; the same for every backend, which only reads them."""
    generator = torch.Generator(CUDA).manual_seed(0)
    tokens, widths = sum(case.lengths), [case.heads, case.kv_heads, case.kv_heads]
    columns = [n * case.head_size for n in widths]
    shape = (tokens, sum(columns) + case.extra)
    wide = torch.randn(shape, generator=generator, device=CUDA).to(dtype)
    parts = wide[:, : sum(columns)].split(columns, dim=1)
    shape = (tokens, case.heads, case.head_size)
    do = torch.randn(shape, generator=generator, device=CUDA).to(dtype)
    return [*(part.unflatten(1, (-1, case.head_size)) for part in parts), do]


@functools.cache
def judges(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What eager makes of the inputs in their dtype, and the fp64 truth."""
    inputs = tensors(case, dtype)
    return eager(case, inputs), run(Reference(), case, [x.double() for x in inputs])


def batch(case: Case) -> Sequences:
    offsets = torch.tensor([0, *accumulate(case.lengths)], device=CUDA)
    return Sequences.from_cu_seqlens(offsets, tokens=sum(case.lengths))


def run(backend, case: Case, inputs: list[Tensor], *, deterministic: bool = False) -> dict:
    q, k, v, do = inputs
    sequences, options = batch(case), {**case.options, "deterministic": deterministic}
    o, lse = backend.forward(q, k, v, sequences, **options)
    dq, dk, dv = backend.backward(do, q, k, v, o, lse, sequences, **options)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def eager(case: Case, inputs: list[Tensor]) -> dict[str, Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])
    outputs = []
    for start, stop in batch(case).bounds():
        repeat = case.heads // case.kv_heads
        qs, ks, vs = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        scores = qs @ ks.repeat_interleave(repeat, 0).mT * case.options["scale"]
        if case.softcap is not None:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        i = torch.arange(stop - start, device=CUDA)
        distance = i[:, None] - i[None, :]
        hidden = (distance < 0) | (distance >= (case.window or stop))
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        p = scores.softmax(-1, dtype=FP32).to(q.dtype)
        outputs.append((p @ vs.repeat_interleave(repeat, 0)).transpose(0, 1))
    o = torch.cat(outputs)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), inputs[3])
    return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize(("backend", "case", "dtype", "deterministic"), MEETINGS)
def test_backend_is_no_worse_than_eager(backend, case, dtype, deterministic) -> None:
    able(backend, case, dtype, deterministic)
    theirs, truth = judges(case, dtype)
    with poisoned_buffers():
        ours = run(backend, case, tensors(case, dtype), deterministic=deterministic)
    assert_no_worse_than(ours, theirs, truth)


@pytest.mark.parametrize(
    ("backend", "case", "dtype", "deterministic"), [m for m in MEETINGS if m.values[3]]
)
def test_deterministic_backward_gives_the_same_bits_every_time(
    backend, case, dtype, deterministic
) -> None:
    able(backend, case, dtype, deterministic)
    inputs = tensors(case, dtype)
    first = run(backend, case, inputs, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    for _ in range(5):
        again = run(backend, case, inputs, deterministic=True)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("backend", ON_CUDA, ids=lambda backend: backend.name)
def test_changing_one_row_changes_no_bit_of_another(backend) -> None:
    case = Case((300, 1, 500, 129, 40))
    able(backend, case, BF16, deterministic=True)
    inputs = tensors(case, BF16)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[301:801] *= 30
    before, after = (run(backend, case, x, deterministic=True) for x in (inputs, changed))
    others = torch.ones(970, dtype=torch.bool)
    others[301:801] = False
    for name in before:
        assert torch.equal(before[name][others], after[name][others])


@pytest.mark.parametrize("case", CASES[:2], ids=str)
@pytest.mark.parametrize("backend", ON_CUDA, ids=lambda backend: backend.name)
def test_outputs_go_into_the_callers_buffer_and_nowhere_else(backend, case) -> None:
    deterministic = backend.capability.deterministic
    able(backend, case, BF16, deterministic)
    inputs = tensors(case, BF16)
    copies = [x.clone() for x in inputs]
    expected = run(backend, case, inputs, deterministic=deterministic)
    tokens, h, g, k = sum(case.lengths), case.heads, case.kv_heads, case.head_size
    wide_o = torch.full((tokens, h * k + 64), float("nan"), device=CUDA, dtype=BF16)
    width = (h + 2 * g) * k
    wide_d = torch.full((tokens, width + 64), float("nan"), device=CUDA, dtype=BF16)
    q, key, v, do = inputs
    options = {**case.options, "deterministic": deterministic}
    o_view = wide_o[:, : h * k].unflatten(1, (h, k))
    parts = wide_d[:, :width].split([h * k, g * k, g * k], dim=1)
    out = tuple(part.unflatten(1, (-1, k)) for part in parts)
    o, lse = backend.forward(q, key, v, batch(case), **options, out=o_view)
    grads = backend.backward(do, q, key, v, o, lse, batch(case), **options, out=out)
    assert wide_o[:, h * k :].isnan().all()
    assert wide_d[:, width:].isnan().all()
    assert torch.equal(o, expected["o"])
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    for name, value in zip(("dq", "dk", "dv"), grads, strict=True):
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-2)


def test_dense_batches_never_wait_for_the_device() -> None:
    q = torch.randn(512, 8, 128, device=CUDA, dtype=BF16)
    k = torch.randn(512, 2, 128, device=CUDA, dtype=BF16)
    warm = Sequences.dense(2, 256, CUDA)
    backend = choose(request(q, k, warm), CUDA)
    backend.backward(q, q, k, k, *backend.forward(q, k, k, warm, scale=0.1), warm, scale=0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sequences = Sequences.dense(2, 256, CUDA)
        o, lse = backend.forward(q, k, k, sequences, scale=0.1)
        backend.backward(q, q, k, k, o, lse, sequences, scale=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_choice_follows_the_measured_order() -> None:
    available = [row.name for row in table(CUDA) if row.available]
    q = torch.empty(512, 8, 128, device=CUDA, dtype=BF16)
    k = torch.empty(512, 2, 128, device=CUDA, dtype=BF16)
    dense = request(q, k, Sequences.dense(2, 256, CUDA))
    first = next(n for n in ("fa4", "cudnn", "flash", "efficient") if n in available)
    assert choose(dense, CUDA).name == first
    packed = replace(dense, packed=True)
    assert choose(packed, CUDA).name != "cudnn"
    assert choose(replace(dense, softcap=30.0), CUDA).name in ("fa4", "triton")
    assert choose(replace(dense, deterministic=True), CUDA).name != "cudnn"
    assert choose(replace(dense, dtype=FP32), CUDA).name == "triton"
