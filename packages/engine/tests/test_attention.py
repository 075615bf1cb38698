"""Every attention backend that runs here, forward and backward, against fp64 truth."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hotloop_core.errors import ConfigError, NoImplementationError
from hotloop_engine.attention import Backend, Request, Sequences, choose, request, table
from hotloop_engine.attention import sequences as sequences_module
from hotloop_engine.attention.backends import BACKENDS
from hotloop_engine.attention.shapes import OFTEN, PLANS, Shapes
from hotloop_testkit.numerics import FLOOR, assert_no_worse_than, poisoned_buffers
from torch import Tensor

BY_NAME = {backend.name: backend for backend in BACKENDS}
CPU = torch.device("cpu")
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is on only where there is no GPU"
)


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
    Case((1,), heads=2),
    Case((2,), heads=8),
    Case((63,), heads=2),
    Case((40, 40), heads=2, kv_heads=1),
    Case((33, 1, 7), heads=4, kv_heads=1, head_size=16),
    Case((1, 1, 1, 25, 1, 1), heads=2, kv_heads=2, head_size=16),
    Case((37, 5), heads=2, kv_heads=1, head_size=80, wide=8),
    Case((33, 17), heads=2, kv_heads=2, head_size=96, wide=3),
    Case((35, 5), heads=2, kv_heads=1, head_size=128, wide=64),
    Case((18, 20), heads=2, kv_heads=2, head_size=256),
]
WINDOWED = [
    Case((35,), heads=2, window=1),
    Case((97,), heads=2, kv_heads=1, window=16),
    Case((70, 3), heads=2, kv_heads=1, window=37),
    Case((9, 12), heads=2, window=64),
    Case((66, 7), heads=2, kv_heads=1, softcap=20.0),
    Case((70, 2), heads=2, kv_heads=1, head_size=80, window=33, softcap=5.0, wide=8),
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


def check(
    backend: Backend, case: Case, inputs: list[Tensor], *, floor: float | None = None
) -> None:
    truth = eager(case, [x.double() for x in inputs])
    with poisoned_buffers():
        ours = run(backend, case, inputs)
    theirs = eager(case, inputs)
    for name in [name for name, exact in truth.items() if not exact.any()]:
        # A token that sees only itself: dq and dk are differences of equal numbers, exactly 0.
        eps = torch.finfo(inputs[0].dtype).eps
        assert ours.pop(name).double().norm() <= 4 * eps * inputs[3].double().norm()
        del theirs[name], truth[name]
    assert_no_worse_than(ours, theirs, truth, floor=floor)


HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float64, torch.float32, *HALF]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *WINDOWED], ids=str)
def test_reference_is_no_worse_than_eager(case: Case, dtype: torch.dtype) -> None:
    check(BY_NAME["reference"], case, tensors(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sdpa_cpu_is_no_worse_than_eager(case: Case, dtype: torch.dtype) -> None:
    # Every flash kernel takes do . o with o as stored. Over two tokens alone, in 16 bits, that
    # costs dq and dk about 1.5 times eager's error (median of 30 seeds); beyond, it averages out.
    coarse = case.lengths == (2,) and dtype in HALF
    check(
        BY_NAME["sdpa_cpu"],
        case,
        tensors(case, dtype),
        floor=2 * FLOOR[dtype] if coarse else None,
    )


@needs_interpreter
@pytest.mark.parametrize("case", [*CASES, *WINDOWED], ids=str)
def test_triton_is_no_worse_than_eager_in_the_interpreter(case: Case) -> None:
    check(BY_NAME["triton"], case, tensors(case, torch.float32))


@needs_interpreter
@pytest.mark.parametrize("case", [CASES[4], WINDOWED[-1]], ids=str)
def test_triton_is_no_worse_than_eager_in_fp16(case: Case) -> None:
    check(BY_NAME["triton"], case, tensors(case, torch.float16))


ON_CPU = [
    pytest.param("reference"),
    pytest.param("sdpa_cpu"),
    pytest.param("triton", marks=needs_interpreter),
]


@pytest.mark.parametrize("name", ON_CPU)
def test_changing_one_row_changes_no_bit_of_another(name: str) -> None:
    case = Case((21, 1, 34, 5), heads=2, kv_heads=1, head_size=16)
    inputs = tensors(case, torch.float32)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[22:56] = torch.randn_like(x[22:56]) * 50
    before, after = (run(BY_NAME[name], case, x) for x in (inputs, changed))
    others = torch.arange(61).lt(22) | torch.arange(61).ge(56)
    for tensor in before:
        assert torch.equal(before[tensor][others], after[tensor][others])
        assert not torch.equal(before[tensor][~others], after[tensor][~others])


@pytest.mark.parametrize("name", ON_CPU)
def test_a_packed_row_is_what_it_is_alone(name: str) -> None:
    case = Case((13, 40, 9), heads=2, kv_heads=1, head_size=16)
    inputs = tensors(case, torch.float64 if name == "reference" else torch.float32)
    together = run(BY_NAME[name], case, inputs)
    row = [x[13:53] for x in inputs]
    alone = run(BY_NAME[name], Case((40,), heads=2, kv_heads=1, head_size=16), row)
    for tensor, value in alone.items():
        assert torch.equal(together[tensor][13:53], value)


@pytest.mark.parametrize("name", ON_CPU)
def test_padding_on_both_sides_changes_nothing_and_stays_finite(name: str) -> None:
    case = Case((12,), heads=2, kv_heads=1, head_size=16)
    row = tensors(case, torch.float32)
    alone = run(BY_NAME[name], case, row)
    padded = [torch.cat([torch.full_like(x[:3], 9), x, torch.full_like(x[:5], -9)]) for x in row]
    padded[3][:3] = padded[3][15:] = 0  # no loss looks at padding
    mask = torch.tensor([[0] * 3 + [1] * 12 + [0] * 5])
    sequences = Sequences.from_padding_mask(mask)
    backend = BY_NAME[name]
    o, lse = backend.forward(*padded[:3], sequences, scale=0.25)
    grads = backend.backward(padded[3], *padded[:3], o, lse, sequences, scale=0.25)
    for tensor, value in zip(("o", "dq", "dk", "dv"), (o, *grads), strict=True):
        assert torch.equal(value[3:15], alone[tensor])
        assert value.isfinite().all()
        if tensor != "o":
            assert not value[:3].any()
            assert not value[15:].any()


@pytest.mark.parametrize("name", ON_CPU)
def test_outputs_go_into_the_callers_buffer_and_nowhere_else(name: str) -> None:
    case = Case((19, 6), heads=4, kv_heads=2, head_size=16)
    inputs = tensors(case, torch.float32)
    expected = run(BY_NAME[name], case, inputs)
    copies = [x.clone() for x in inputs]
    wide_o = torch.full((25, 4 * 16 + 8), float("nan"))
    wide_d = torch.full((25, 8 * 16 + 5), float("nan"))
    q, k, v, do = inputs
    sequences, backend = batch(case.lengths), BY_NAME[name]
    o_view = wide_o[:, :64].unflatten(1, (4, 16))
    parts = wide_d[:, :128].split([64, 32, 32], dim=1)
    out = tuple(part.unflatten(1, (-1, 16)) for part in parts)
    o, lse = backend.forward(q, k, v, sequences, scale=0.25, out=o_view)
    grads = backend.backward(do, q, k, v, o, lse, sequences, scale=0.25, out=out)
    assert o is o_view
    assert all(given is wanted for given, wanted in zip(grads, out, strict=True))
    for tensor, value in zip(("o", "dq", "dk", "dv"), (o, *grads), strict=True):
        assert torch.equal(value, expected[tensor])
    assert wide_o[:, 64:].isnan().all()
    assert wide_d[:, 128:].isnan().all()
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", ON_CPU)
def test_any_strides_give_the_same_result(name: str) -> None:
    case = Case((11, 20), heads=2, kv_heads=1, head_size=16)
    inputs = tensors(case, torch.float32)
    expected = run(BY_NAME[name], case, inputs)
    heads_outside = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    values_outside = [x.mT.contiguous().mT for x in inputs]
    for strange in (heads_outside, values_outside):
        found = run(BY_NAME[name], case, strange)
        for tensor, value in expected.items():
            torch.testing.assert_close(found[tensor], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_gradient_of_stride_zero_is_accepted(name: str) -> None:
    case = Case((9,), heads=2, kv_heads=2, head_size=16)
    q, k, v, _ = tensors(case, torch.float32)
    ones = torch.ones(())
    expanded = run(BY_NAME[name], case, [q, k, v, ones.expand(9, 2, 16)])
    plain = run(BY_NAME[name], case, [q, k, v, torch.ones(9, 2, 16)])
    for tensor, value in plain.items():
        torch.testing.assert_close(expanded[tensor], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_no_tokens_give_empty_results(name: str) -> None:
    q, k = torch.empty(0, 4, 16), torch.empty(0, 2, 16)
    sequences = Sequences.dense(0, 8, "cpu")
    o, lse = BY_NAME[name].forward(q, k, k, sequences, scale=1.0)
    dq, dk, dv = BY_NAME[name].backward(q, q, k, k, o, lse, sequences, scale=1.0)
    assert [x.shape for x in (o, dq, dk, dv)] == [q.shape, q.shape, k.shape, k.shape]


@pytest.mark.parametrize("name", ON_CPU)
def test_backward_gives_the_same_bits_twice(name: str) -> None:
    case = Case((35, 5), heads=2, kv_heads=1, head_size=32)
    inputs = tensors(case, torch.float32)
    first, second = (run(BY_NAME[name], case, inputs, deterministic=True) for _ in range(2))
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)


def asked(**changes: object) -> Request:
    return replace(Request(dtype=torch.float32, heads=4, kv_heads=2, head_size=64), **changes)


def test_on_the_cpu_pytorchs_kernel_comes_first_and_the_reference_does_the_rest() -> None:
    assert choose(asked(), CPU).name == "sdpa_cpu"
    assert choose(asked(packed=True, deterministic=True), CPU).name == "sdpa_cpu"
    assert choose(asked(window=8), CPU).name == "reference"
    assert choose(asked(softcap=30.0), CPU).name == "reference"


def test_a_forced_backend_is_taken_or_refused_with_its_reason() -> None:
    assert choose(asked(), CPU, "reference").name == "reference"
    with pytest.raises(NoImplementationError, match=r"'sdpa_cpu' cannot .* no sliding window"):
        choose(asked(window=8), CPU, "sdpa_cpu")
    with pytest.raises(NoImplementationError, match=r"'flash' cannot .* runs on cuda, not on cpu"):
        choose(asked(), CPU, "flash")
    with pytest.raises(ConfigError, match="'flesh'; expected one of fa4, cudnn, flash"):
        choose(asked(), CPU, "flesh")


def test_a_shape_of_batch_is_fresh_until_a_plan_for_it_pays() -> None:
    shapes = Shapes()
    assert not any(shapes.is_fresh((2, length)) for length in range(100, 100 + PLANS))
    assert all(shapes.is_fresh((2, length)) for length in range(200, 300))
    assert not shapes.is_fresh((2, 100))  # has its plan
    assert [shapes.is_fresh((1, 77)) for _ in range(OFTEN + 1)] == [True] * (OFTEN - 1) + [
        False
    ] * 2
    assert not shapes.is_fresh((1, 8192))  # gains a plan's time at once


def test_one_batch_is_judged_once_and_packed_ones_are_never_fresh(monkeypatch) -> None:
    shapes = Shapes()
    monkeypatch.setattr(sequences_module, "SHAPES", shapes)
    for length in range(PLANS):
        assert not Sequences.dense(1, 1 + length, CPU).fresh
    one = Sequences.dense(1, 500, CPU)
    assert [one.fresh for _ in range(2 * OFTEN)] == [True] * 2 * OFTEN
    assert not Sequences.from_cu_seqlens(torch.tensor([0, 3, 10]), tokens=10).fresh


def test_a_backend_with_plans_is_passed_over_for_a_fresh_shape_unless_it_is_named() -> None:
    capability = replace(BY_NAME["cudnn"].capability, devices=frozenset({"cpu"}))
    half = asked(dtype=torch.bfloat16)
    assert capability.refusal(half) is None
    assert "not come often enough" in capability.refusal(replace(half, fresh=True))
    assert BY_NAME["flash"].capability.refusal(replace(half, fresh=True)) is None
    fresh = asked(fresh=True)
    assert choose(fresh, CPU, "reference") is choose(asked(), CPU, "reference")


def test_when_none_can_each_says_why() -> None:
    with pytest.raises(NoImplementationError) as caught:
        choose(asked(dtype=torch.int8), CPU)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == list(BY_NAME)
    assert "reference: computes in bfloat16, float16, float32, float64, not in int8" in lines[-1]


def test_a_backend_called_past_choose_still_refuses() -> None:
    q, k, v, _ = tensors(Case((9,)), torch.float32)
    with pytest.raises(NoImplementationError, match=r"no soft cap \(30.0 asked for\)"):
        BY_NAME["sdpa_cpu"].forward(q, k, v, batch((9,)), scale=1.0, softcap=30.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "5 query heads over 2"),
        ({"window": 0}, "window=0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ],
)
def test_a_request_that_means_nothing_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(**changes)


def test_a_window_as_long_as_the_longest_sequence_is_none() -> None:
    q, k, _, _ = tensors(Case((5, 9)), torch.float32)
    assert request(q, k, batch((5, 9)), window=9).window is None
    assert request(q, k, batch((5, 9)), window=8).window == 8
    assert request(q, k, batch((5, 9))).packed
    assert not request(q, k, Sequences.dense(2, 7, "cpu")).packed
    assert request(q, k, Sequences.dense(14, 1, "cpu")).packed  # no dense kernel takes length 1


def test_the_table_has_a_reason_wherever_a_backend_cannot_run() -> None:
    rows = {row.name: row for row in table("cpu")}
    assert list(rows) == list(BY_NAME)
    assert all(row.available or row.reason for row in rows.values())
    assert rows["sdpa_cpu"].available
    assert not rows["sdpa_cpu"].window
    assert rows["cudnn"].reason == "runs on cuda, not on cpu"
