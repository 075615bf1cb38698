"""What nobody should pass to an op, and somebody will: ends of ranges, nothing at all, shapes that do not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hotloop_core.errors import ConfigError, DataError
from hotloop_core.kernels import HeadLossOptions, HeadNorm
from hotloop_engine.attention import Sequences
from hotloop_engine.attention.backends.triton import Triton
from hotloop_engine.attention.reference import Reference
from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.dropout import dropout
from hotloop_engine.ops.layer_norm import layer_norm
from hotloop_engine.ops.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from hotloop_engine.ops.lora_linear import LinearGroup, LinearView, Lora, lora_linear
from hotloop_engine.ops.lora_linear.reference import lora_linear_reference
from hotloop_engine.ops.rms_norm import rms_norm
from hotloop_engine.ops.rope import rope
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers, relative_error

# NumPy warns in Triton's interpreter of what lanes compute that are not selected afterwards.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="Triton's interpreter is on only where there is no GPU",
    ),
]

IMPLS = ("reference", "triton")
CPU = torch.device("cpu")


def adapter(rank: int, n: int, k: int, dtype: torch.dtype = torch.float32, **options) -> Lora:
    a, b = torch.randn(rank, k) * 0.2, torch.randn(n, rank) * 0.2
    options = {"scale": 0.75, **options}
    return Lora(a_RK=a.to(dtype).requires_grad_(), b_NR=b.to(dtype).requires_grad_(), **options)


def passes(function, x: torch.Tensor, views, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    leaves = [x, *(t for view in views for t in view.tensors() if t.requires_grad)]
    y = function(x)
    found = torch.autograd.grad(y, leaves, dy)
    return {"y": y, **{str(i): g for i, g in enumerate(found)}}


def side_by_side(views):
    return lambda x: torch.cat([lora_linear_reference(x, view) for view in views], -1)


@pytest.mark.parametrize("tokens", [3, 90])
def test_an_fp16_bias_whose_product_with_dy_overflows_leaves_dx_finite(tokens: int) -> None:
    weight = (torch.randn(48, 40) * 0.01).half()
    bias = torch.full((48,), 300.0).half()
    view = LinearView(weight=weight, bias=bias, lora=adapter(4, 48, 40))
    dy = torch.full((tokens, 48), 30.0).half()  # 48 * 30 * 300 is past 65,504
    found = passes(lambda x: lora_linear(x, [view]), torch.randn(tokens, 40).half(), [view], dy)
    assert all(bool(t.isfinite().all()) for t in found.values())
    base = dy.double() @ weight.double()
    lora = view.lora
    exact = base + 0.75 * (dy.double() @ lora.b_NR.double()) @ lora.a_RK.double()
    assert relative_error(found["0"], exact) < 2e-3


@pytest.mark.parametrize("rank", [4, 70])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fp64_projections_have_fp64_gradients(rank: int, p: float) -> None:
    weight = torch.randn(48, 40, dtype=torch.float64)
    bias = torch.randn(48, dtype=torch.float64).requires_grad_()
    view = LinearView(
        weight=weight, bias=bias, lora=adapter(rank, 48, 40, torch.float64, dropout=p)
    )
    x, dy = torch.randn(9, 40, dtype=torch.float64), torch.randn(9, 48, dtype=torch.float64)
    torch.manual_seed(5)
    ours = passes(lambda x: lora_linear(x, [view]), x, [view], dy)
    torch.manual_seed(5)
    seed = int(torch.randint(2**31 - 1, (1,)))
    mask = dropout(torch.ones_like(x), p, seed) if p else None
    exact = passes(lambda x: lora_linear_reference(x, view, mask), x, [view], dy)
    for name, truth in exact.items():
        assert relative_error(ours[name], truth) < 1e-13, name


@pytest.mark.parametrize("scale", [0.0, -2.0])
@pytest.mark.parametrize("ranks", [(1, 3, None), (None, 7, 2)])
@pytest.mark.parametrize("tokens", [0, 1, 100])
def test_any_scale_and_uneven_ranks_are_exact(scale: float, ranks, tokens: int) -> None:
    sizes = (17, 33, 1)
    views = [
        LinearView(
            weight=torch.randn(n, 19) * 0.2,
            lora=None if rank is None else adapter(rank, n, 19, scale=scale),
        )
        for n, rank in zip(sizes, ranks, strict=True)
    ]
    x, dy = torch.randn(tokens, 19), torch.randn(tokens, sum(sizes))
    truth = passes(side_by_side(views), x, views, dy)
    with poisoned_buffers():
        ours = passes(lambda x: lora_linear(x, views), x, views, dy)
    assert_no_worse_than(ours, truth, truth, floor=2e-6)


@pytest.mark.parametrize("p", [0.5, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_is_finite_up_to_a_probability_of_one(p: float, impl: str) -> None:
    found = dropout(torch.full((50, 40), 3.0), p, 7, impl=impl)
    assert bool(found.isfinite().all())
    assert (found != 0).any() == (p == 0.5)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_keeps_fp64(impl: str) -> None:
    x = torch.full((9, 40), 1 / 3, dtype=torch.float64)
    kept = dropout(x, 0.5, 7, impl=impl)
    assert set(kept.flatten().tolist()) == {0.0, 2 / 3}


def test_more_adapter_columns_than_one_tile_holds_are_filled_alike() -> None:
    kernel, reference = (
        implementation("lora_linear", CPU, name) for name in ("triton", "reference")
    )
    views = [
        LinearView(weight=torch.randn(n, 40), bias=torch.randn(n), lora=adapter(r, n, 40))
        for n, r in ((48, 60), (16, 3), (33, 70))
    ]
    group = LinearGroup(views, torch.float32, CPU)
    assert group.columns > 128
    found, expected = (
        (torch.full((group.n, group.columns), float("nan")),
         torch.full((group.columns, 43), float("nan"))[:, :40])
        for _ in range(2)
    )  # fmt: skip
    kernel.fill_columns(group, *found)
    reference.fill_columns(group, *expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_4bit_weight_past_31_bits_is_left_to_the_kernel_that_counts_in_64() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from hotloop_engine.ops.lora_linear import kernel
    from hotloop_engine.ops.nf4 import from_bitsandbytes

    small = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    weight = from_bitsandbytes(small)
    for rows, taken in ((2**31 // 64, False), (64, True)):
        view = LinearView(weight=dataclasses.replace(weight, shape=(rows, 64)))
        group = LinearGroup([view], torch.float16, CPU)
        assert (kernel._four_bit(group) is not None) == taken


def test_cards_without_matrix_products_in_triton_leave_the_sums_to_gemms(monkeypatch) -> None:
    kernel = implementation("adapter_gradients", CPU, "triton")
    view = LinearView(weight=torch.randn(8, 8).half(), lora=adapter(2, 8, 8))
    group = LinearGroup([view], torch.float16, CPU)
    assert kernel.fits(group)
    group.device = torch.device("cuda", 0)
    for capability, fits in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        kernel._has_matrix_products.cache_clear()
        assert kernel.fits(group) == fits
    kernel._has_matrix_products.cache_clear()


@pytest.mark.parametrize(
    ("x", "views", "message"),
    [
        ((3, 8), [], "no projections"),
        ((3, 9), [LinearView(weight=torch.zeros(4, 8))], r"expected x \(8,\)"),
        (
            (3, 8),
            [LinearView(weight=torch.zeros(4, 8)), LinearView(weight=torch.zeros(4, 7))],
            "projection 1 has",
        ),
        ((3, 8), [LinearView(weight=torch.zeros(4, 8), bias=torch.zeros(5))], r"bias \(4,\)"),
        ((3, 8), [LinearView(weight=torch.zeros(4, 8), lora=adapter(2, 5, 8))], r"B \(4, 2\)"),
        ((3, 8), [LinearView(weight=torch.zeros(4, 8), lora=adapter(2, 4, 9))], r"A \(2, 8\)"),
    ],
)
def test_projections_that_do_not_fit_are_refused_by_number(x, views, message) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_linear(torch.zeros(x), views)


@pytest.mark.parametrize("softcap", [1e-3, 1.0, 900.0, 1e5, 1e7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_our_attention_kernel_keeps_its_precision_at_any_soft_cap(softcap, dtype) -> None:
    q, k, v, do = (torch.randn(40, 2, 16).to(dtype) for _ in range(4))
    sequences = Sequences.dense(1, 40, "cpu")
    options = {"scale": 0.25, "softcap": softcap}

    def run(backend, inputs):
        q, k, v, do = inputs
        o, lse = backend.forward(q, k, v, sequences, **options)
        gradients = backend.backward(do, q, k, v, o, lse, sequences, **options)
        return dict(zip(("o", "dq", "dk", "dv"), (o, *gradients), strict=True))

    inputs = (q, k, v, do)
    exact = run(Reference(), [x.double() for x in inputs])
    ours = run(Triton(), inputs)
    eps = torch.finfo(dtype).eps
    for name, truth in exact.items():
        distance = (ours[name].double() - truth).norm()
        # With a tiny cap dq and dk all but vanish: what is left of them is judged against do.
        assert distance <= 4 * eps * max(truth.norm(), do.double().norm()), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        HeadLossOptions(softcap=1e-3),
        HeadLossOptions(softcap=1e6),
        HeadLossOptions(scale=0.0),
        HeadLossOptions(scale=-3.0, softcap=2.0),
        HeadLossOptions(z_loss=10.0, label_smoothing=1.0),
    ],
    ids=str,
)
def test_the_loss_is_exact_at_the_ends_of_its_options(impl: str, options: HeadLossOptions) -> None:
    hidden, weight = torch.randn(7, 12) * 20, torch.randn(33, 12)
    labels = torch.randint(33, (7,))

    def run(dtype: torch.dtype, name: str) -> dict[str, torch.Tensor]:
        h, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
        out = linear_log_probs(h, w, labels, options=options, entropy=True, impl=name)
        gradients = torch.autograd.grad(out.loss.sum() + out.log_prob.sum(), (h, w))
        return {"loss": out.loss, "entropy": out.entropy, "dh": gradients[0], "dw": gradients[1]}

    exact = run(torch.float64, "reference")
    ours = run(torch.float32, impl)
    for name, truth in exact.items():
        torch.testing.assert_close(ours[name].double(), truth.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("label", [-1, 11, 2**40])
def test_a_label_outside_the_vocabulary_is_refused_or_makes_the_loss_nan(label: int) -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(11, 4)
    labels = torch.tensor([2, label, 5])
    with pytest.raises(DataError, match=f"label {label} is no class of a vocabulary of 11"):
        linear_cross_entropy(hidden, weight, labels)
    out = linear_log_probs(hidden, weight, labels, impl="triton")
    assert out.loss.isnan().tolist() == [False, True, False]
    assert linear_cross_entropy(hidden, weight, labels, impl="triton").isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_norms_of_no_columns_and_of_one_are_what_the_equation_says(impl: str) -> None:
    assert rms_norm(torch.empty(3, 0), None, eps=1.0, impl=impl).shape == (3, 0)
    assert layer_norm(torch.empty(3, 0), None, None, eps=1.0, impl=impl).shape == (3, 0)
    one = rms_norm(torch.tensor([[3.0], [-4.0]]), None, eps=1e-12, impl=impl)
    torch.testing.assert_close(one, torch.tensor([[1.0], [-1.0]]))
    assert not layer_norm(torch.tensor([[3.0]]), None, None, eps=1.0, impl=impl).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_rotation_without_columns_is_refused(impl: str) -> None:
    q, table = torch.zeros(3, 1, 8), torch.zeros(3, 0)
    with pytest.raises(ConfigError, match="2 to 8"):
        rope(q, q, table, table, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_rope_takes_one_head_of_two_columns_and_normed_heads_of_zeros(impl: str) -> None:
    q, k = torch.zeros(3, 1, 2, requires_grad=True), torch.randn(3, 1, 2)
    cos, sin = torch.randn(2, 3, 2)
    norm = HeadNorm(w_K=torch.ones(2), eps=1e-6)
    y, _ = rope(q, k, cos, sin, q_norm=norm, impl=impl)
    (dq,) = torch.autograd.grad(y.sum(), q)
    assert not y.any()
    assert bool(dq.isfinite().all())


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0.0, 2.5, 5.0]), "torch.float32; expected integers"),
        (torch.tensor([0, 4, 3, 5], dtype=torch.uint8), "and fall"),
        (torch.tensor([1, 5]), "from 1 to 5"),
        (torch.tensor([0, -2, 5]), "and fall"),
        (torch.zeros(0, dtype=torch.int32), "one dimension"),
    ],
)
def test_offsets_that_are_none_are_refused(offsets: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Sequences.from_cu_seqlens(offsets, tokens=5)
