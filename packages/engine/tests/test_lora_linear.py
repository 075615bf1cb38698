from __future__ import annotations

import pytest
import torch
from hotloop_engine.ops.dropout import dropout
from hotloop_engine.ops.lora_linear import LinearView, Lora, lora_linear
from hotloop_engine.ops.lora_linear.reference import lora_linear_reference
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers

SHAPES = {"one": [48], "group": [48, 16, 33]}
KERNEL_DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled for the card")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
"""Where a kernel itself is called: on the CPU Triton's interpreter runs it."""


def make_views(sizes, k, *, rank, bias, dtype, trains=False, skip=()):
    views = []
    for i, n in enumerate(sizes):
        weight = (torch.randn(n, k) * 0.2).to(dtype).requires_grad_(trains)
        lora = None
        if rank and i not in skip:
            a, b = torch.randn(rank, k) * 0.2, torch.randn(n, rank) * 0.2
            lora = Lora(a_RK=a.requires_grad_(), b_NR=b.requires_grad_(), scale=0.75)
        b = torch.randn(n).to(dtype).requires_grad_(trains) if bias else None
        views.append(LinearView(weight=weight, bias=b, lora=lora))
    return views


def converted(views, dtype):
    def change(tensor):
        return (
            None
            if tensor is None
            else tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
        )

    return [
        LinearView(
            weight=change(v.weight),
            bias=change(v.bias),
            lora=None
            if v.lora is None
            else Lora(a_RK=change(v.lora.a_RK), b_NR=change(v.lora.b_NR), scale=v.lora.scale),
        )
        for v in views
    ]


def results(function, x, views, dy):
    x = x.detach().requires_grad_()
    tensors = [x] + [t for v in views for t in v.tensors() if t.requires_grad]
    y = function(x)
    grads = torch.autograd.grad(y, tensors, dy.to(y.dtype))
    return {"y": y, **{f"grad{i}": g for i, g in enumerate(grads)}}


def compare(x, views, dy):
    def plain(vs):
        return lambda x: torch.cat([lora_linear_reference(x, v) for v in vs], -1)

    exact = converted(views, torch.float64)
    truth = results(plain(exact), x.double(), exact, dy.double())
    eager = results(plain(views), x, views, dy)
    with poisoned_buffers():
        ours = results(lambda x: lora_linear(x, views), x, views, dy)
    # One rounding of a 16-bit operand is what eager is allowed, too; below it the comparison is luck.
    floor = 4e-3 if x.dtype == torch.bfloat16 else None
    assert_no_worse_than(ours, eager, truth, slack=0.15, floor=floor)


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tokens", [1, 40, 200])
@pytest.mark.parametrize("rank, bias", [(0, False), (0, True), (1, False), (5, True), (64, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_linear_is_no_worse_than_eager(sizes, tokens, rank, bias, dtype):
    views = make_views(sizes, 40, rank=rank, bias=bias, dtype=dtype)
    compare(torch.randn(tokens, 40).to(dtype), views, torch.randn(tokens, sum(sizes)).to(dtype))


@pytest.mark.parametrize("rank, bias", [(0, True), (1, False), (5, True), (64, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_much_wider_than_the_input_are_no_worse_than_eager(rank, bias, dtype):
    """Their dx and dt come from one GEMM."""
    views = make_views([130, 70], 40, rank=rank, bias=bias, dtype=dtype)
    compare(torch.randn(200, 40).to(dtype), views, torch.randn(200, 200).to(dtype))


@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("rank", [0, 4])
def test_full_fine_tuning_gives_weight_and_bias_gradients(tokens, rank):
    views = make_views([48, 16], 40, rank=rank, bias=True, dtype=torch.float32, trains=True)
    compare(torch.randn(tokens, 40), views, torch.randn(tokens, 64))


def test_a_projection_without_an_adapter_may_stand_between_two_with_one():
    views = make_views([48, 16, 33], 40, rank=4, bias=False, dtype=torch.float32, skip={1})
    compare(torch.randn(100, 40), views, torch.randn(100, 97))


@pytest.mark.parametrize("tokens", [3, 300])
def test_dropout_draws_one_mask_per_projection_and_backward_uses_the_same(tokens):
    views = make_views([48, 16], 40, rank=4, bias=False, dtype=torch.float32)
    views = [
        LinearView(
            weight=v.weight,
            lora=Lora(a_RK=v.lora.a_RK, b_NR=v.lora.b_NR, scale=v.lora.scale, dropout=0.3),
        )
        for v in views
    ]
    x, dy = torch.randn(tokens, 40), torch.randn(tokens, 64)
    torch.manual_seed(5)
    ours = results(lambda x: lora_linear(x, views), x, views, dy)
    torch.manual_seed(5)
    seeds = torch.randint(2**31 - 1, (2,)).tolist()
    masks = [dropout(torch.ones_like(x), 0.3, s) for s in seeds]
    assert not torch.equal(*masks)

    def plain(x):
        pairs = zip(views, masks, strict=True)
        return torch.cat([lora_linear_reference(x, v, m) for v, m in pairs], -1)

    exact = results(plain, x, views, dy)
    assert_no_worse_than(ours, exact, exact, floor=1e-5)


def test_a_gradient_of_stride_zero_is_accepted():
    views = make_views([48], 40, rank=4, bias=False, dtype=torch.float32)
    x = torch.randn(7, 40, requires_grad=True)
    lora_linear(x, views).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("sizes", [[100], [70, 33], [48, 16, 33]])
@pytest.mark.parametrize("rank, bias, skip", [(3, False, ()), (16, True, (1,)), (0, True, ())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_fills_what_the_reference_fills(device, sizes, rank, bias, skip, dtype):
    kernel, reference = (
        pytest.importorskip(f"hotloop_engine.ops.lora_linear.{name}")
        for name in ("kernel", "reference")
    )
    from hotloop_engine.ops.lora_linear import LinearGroup

    views = make_views(sizes, 40, rank=rank, bias=bias, dtype=dtype, skip=skip)
    views = [
        LinearView(
            weight=v.weight.to(device),
            bias=None if v.bias is None else v.bias.to(device),
            lora=None
            if v.lora is None
            else Lora(
                a_RK=v.lora.a_RK.to(device),
                b_NR=v.lora.b_NR.to(device),
                scale=v.lora.scale,
                dropout=0.1 if i == 1 else 0.0,
            ),
        )
        for i, v in enumerate(views)
    ]
    group = LinearGroup(views, dtype, torch.device(device))
    found, expected = (
        (
            torch.full((group.n, group.columns), float("nan"), dtype=dtype, device=device),
            torch.full((group.columns, 40 + 3), float("nan"), dtype=dtype, device=device)[:, :40],
        )
        for _ in range(2)
    )
    for target, op in ((found, kernel), (expected, reference)):
        op.fill_columns(group, *target)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(
    "sizes, rank, bias", [([64], 3, True), ([96, 32], 4, False), ([64, 32, 33], 16, True)]
)
@pytest.mark.parametrize("nested", [True, False])
def test_one_launch_extends_4bit_weights_as_the_pieces_do(device, sizes, rank, bias, nested):
    kernel, nf4 = (
        pytest.importorskip(f"hotloop_engine.ops.{name}")
        for name in ("lora_linear.kernel", "nf4.reference")
    )
    functional = pytest.importorskip("bitsandbytes.functional")
    from hotloop_engine.ops.lora_linear import LinearGroup
    from hotloop_engine.ops.lora_linear.reference import fill_columns
    from hotloop_engine.ops.nf4 import from_bitsandbytes

    views = []
    for view in make_views(sizes, 64, rank=rank, bias=bias, dtype=torch.float32):
        packed, state = functional.quantize_4bit(
            view.weight.to(device), blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        packed.quant_state = state
        lora = Lora(a_RK=view.lora.a_RK.to(device), b_NR=view.lora.b_NR.to(device), scale=0.75)
        moved = None if view.bias is None else view.bias.to(device)
        views.append(LinearView(weight=from_bitsandbytes(packed), bias=moved, lora=lora))
    group = LinearGroup(views, torch.float32, torch.device(device))
    size = (group.n + group.columns, group.k + group.columns)
    found, expected = (torch.zeros(size, device=device) for _ in range(2))
    for view, rows in zip(views, group.rows, strict=True):
        nf4.forward(view.weight, out=expected[rows, :64])
    fill_columns(group, expected[: group.n, 64:], expected[group.n :, :64])
    assert kernel.extend(group, found)
    assert torch.equal(found, expected)
