"""The sums behind the adapters' gradients, and the MLP's middle that makes some of them on the way."""

from __future__ import annotations

import pytest
import torch
from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.adapter_gradients.reference import ColumnScale
from hotloop_engine.ops.lora_linear import LinearGroup, LinearView, Lora
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter multiplies bf16 matrices wrongly; on a GPU both types are tried.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]


def triton(op):
    return implementation(op, DEVICE, "triton")


def reference(op):
    return implementation(op, DEVICE, "reference")


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)


def strided(x, behind):
    """x as the first columns of a wider buffer, as blocks hold it; the buffer."""
    wide = x.new_full((x.shape[0], x.shape[1] + behind), float("nan"))
    wide[:, : x.shape[1]] = x
    return wide


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, m, columns", [(1, 130, 1), (63, 40, 16), (600, 257, 48)])
@pytest.mark.parametrize("scaled", [False, True])
def test_column_sums_of_views_are_no_worse_than_a_gemm(dtype, tokens, m, columns, scaled):
    a, b = random(tokens, m, dtype=dtype), random(tokens, columns, dtype=dtype)
    scale = torch.rand(tokens, device=DEVICE) if scaled else None
    op, wide_a, wide_b = triton("adapter_gradients"), strided(a, 16), strided(b, 8)
    with poisoned_buffers():
        ours = op.column_sums(wide_a[:, :m], wide_b[:, :columns], row_scale_T=scale)
    factor = 1.0 if scale is None else scale.double()[:, None]
    exact = {"sums": a.double().T @ (b.double() * factor)}
    eager = {"sums": reference("adapter_gradients").column_sums(a, b, row_scale_T=scale)[0]}
    assert ours.dtype == torch.float32
    assert_no_worse_than({"sums": ours.sum(0)[:, :columns]}, eager, exact, floor=1e-5)


def make_group(sizes, ranks, k, dtype):
    views = []
    for i, (n, rank) in enumerate(zip(sizes, ranks, strict=True)):
        lora = None
        if rank:
            lora = Lora(
                a_RK=random(rank, k, dtype=torch.float32),
                b_NR=random(n, rank, dtype=torch.float32),
                scale=0.5 + i,
            )
        views.append(LinearView(weight=random(n, k, dtype=dtype), lora=lora))
    return LinearGroup(views, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes, ranks",
    [([70], [4]), ([64, 40], [3, 5]), ([130, 33, 17], [16, 8, 1]), ([40, 24, 24], [4, 0, 2])],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_groups_gradients_are_cut_out_of_the_sums(dtype, sizes, ranks, scaled):
    group = make_group(sizes, ranks, 90, dtype)
    tokens = 300
    dy, t = random(tokens, group.n, dtype=dtype), random(tokens, group.rank, dtype=dtype)
    x, dt = random(tokens, group.k, dtype=dtype), random(tokens, group.rank, dtype=dtype)
    scale = ColumnScale(torch.rand(group.k, device=DEVICE).to(dtype), 1.0) if scaled else None
    op, plain = triton("adapter_gradients"), reference("adapter_gradients")
    assert op.fits(group)
    with poisoned_buffers():
        ours = op.gradients(group, op.column_sums(dy, t), op.column_sums(x, dt), scale)
    known = plain.gradients(group, plain.column_sums(dy, t), plain.column_sums(x, dt), scale)
    for view, one, other in zip(group.views, ours, known, strict=True):
        if view.lora is None:
            assert one is None and other is None
            continue
        assert one[0].shape == view.lora.a_RK.shape and one[1].shape == view.lora.b_NR.shape
        for mine, theirs in zip(one, other, strict=True):
            assert mine.is_contiguous()
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    "tokens, columns, ranks", [(1, 40, (1, 1)), (65, 300, (8, 4)), (600, 64, (48, 64))]
)
def test_backward_makes_the_gradients_and_their_sums_in_one_pass(
    dtype, activation, tokens, columns, ranks
):
    def inputs(kind):
        torch.manual_seed(3)
        wide = random(tokens, 2 * columns + 16, dtype=dtype)
        parts = (
            wide[:, :columns],
            wide[:, columns : 2 * columns],
            random(tokens, columns, dtype=dtype),
        )
        narrow = random(tokens, ranks[0], dtype=dtype), random(tokens, ranks[1] + 8, dtype=dtype)
        return [p.clone().to(kind) if kind == torch.float64 else p for p in (*parts, *narrow)]

    def run(op, kind):
        gate, up, dh, t, dt = inputs(kind)
        with poisoned_buffers():
            db, da = op.backward_(dh, gate, up, t, dt[:, : ranks[1]], activation=activation)
        return {
            "dgate": gate,
            "dup": up,
            "db": db.sum(0)[:, : ranks[0]],
            "da": da.sum(0)[:, : ranks[1]],
        }

    exact = run(reference("adapter_glu"), torch.float64)
    eager, ours = run(reference("adapter_glu"), dtype), run(triton("adapter_glu"), dtype)
    assert_no_worse_than(ours, eager, exact, slack=0.15, floor=1e-3)
    again = run(triton("adapter_glu"), dtype)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "the same bits, twice"
