from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hotloop_core.kernels import HeadLossOptions
from hotloop_engine.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_log_probs,
)
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers, relative_error
from torch import Tensor

IMPLS = ["reference", "triton"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PLAIN = HeadLossOptions()
EVERYTHING = HeadLossOptions(
    label_smoothing=0.1, softcap=3.0, scale=0.7, z_loss=1e-2, temperature=1.3
)
OPTIONS = {
    "plain": PLAIN,
    "smoothing": HeadLossOptions(label_smoothing=0.2),
    "softcap": HeadLossOptions(softcap=2.0),
    "high softcap": HeadLossOptions(softcap=60.0),  # higher than e^z may be summed for
    "scale": HeadLossOptions(scale=0.5),
    "z_loss": HeadLossOptions(z_loss=1e-2),
    "temperature": HeadLossOptions(temperature=2.0),
    "everything": EVERYTHING,
}
SIZES = [(1, 5, 8), (13, 37, 24), (6, 4100, 16)]  # T, V, D; 4,100 is more than one block of logits


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor

    def to(self, dtype: torch.dtype, *, train: str = "hidden weight bias") -> Head:
        """New leaves of this dtype; `train` names those that need a gradient."""
        tensors = (
            None if t is None else t.detach().to(dtype).requires_grad_(name in train.split())
            for name, t in zip(("hidden", "weight", "bias"), self[:3], strict=True)
        )
        return Head(*tensors, self.labels)

    def gradients(self) -> dict[str, Tensor | None]:
        names = ("hidden", "weight", "bias")
        return {
            f"d{n}": None if t is None else t.grad for n, t in zip(names, self[:3], strict=True)
        }


def head(
    T: int, V: int, D: int, dtype: torch.dtype, *, bias: bool = True, device: str = "cpu"
) -> Head:
    """Numbers that `dtype` holds exactly; every third label ignored where there are three."""
    labels = torch.randint(V, (T,), device=device)
    labels[2::3] = -100
    hidden = torch.randn(T, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype)
    return Head(hidden, weight, torch.randn(V, device=device).to(dtype) if bias else None, labels)


def eager(one: Head, options: HeadLossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log_prob, entropy) of each label: logits in the dtype, the rest in fp32."""
    logits = F.linear(one.hidden, one.weight, one.bias) * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z / options.temperature
    loss = F.cross_entropy(
        z,
        one.labels,
        reduction="none",
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
    )
    trained = one.labels != options.ignore_index
    loss = loss + trained * options.z_loss * z.logsumexp(-1).square()
    log_p = z.log_softmax(-1)
    log_prob = log_p.gather(1, one.labels.clamp_min(0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return loss, log_prob * trained, entropy * trained


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("T, V, D", SIZES)
@pytest.mark.parametrize("train", ["hidden", "hidden weight bias"])
def test_the_summed_loss_and_its_gradients_are_no_worse_than_eager(
    impl, dtype, options, T, V, D, train
) -> None:
    made = head(T, V, D, dtype)

    def measured(one: Head, loss: Tensor) -> dict[str, Tensor | None]:
        loss.backward()
        return {"loss": loss, **one.gradients()}

    ours, plain, exact = (
        made.to(dtype, train=train),
        made.to(dtype, train=train),
        made.to(torch.float64, train=train),
    )
    with poisoned_buffers():
        loss = linear_cross_entropy(
            ours.hidden,
            ours.weight,
            ours.labels,
            bias=ours.bias,
            options=options,
            num_items=7,
            chunk_tokens=4,
            impl=impl,
        )
        mine = measured(ours, loss)
    compared = (
        mine,
        measured(plain, eager(plain, options)[0].sum() / 7),
        measured(exact, eager(exact, options)[0].sum() / 7),
    )
    # One number out of rounded logits: eager's errors may cancel by luck, so 16-bit has a floor.
    losses = ({"loss": values.pop("loss")} for values in compared)
    assert_no_worse_than(*losses, floor=max(2e-6, torch.finfo(dtype).eps / 8))
    assert_no_worse_than(*compared)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("train", ["hidden", "hidden weight bias", "bias"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_every_output_and_its_gradient_are_no_worse_than_eager(
    impl, dtype, options, train, entropy_gradient
) -> None:
    made = head(13, 37, 24, dtype)
    weights = torch.randn(3, 13, dtype=torch.float64)
    if not entropy_gradient:
        weights[2] = 0

    def measured(one: Head, outputs: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
        loss, log_prob, entropy = outputs
        assert entropy.requires_grad or not entropy_gradient
        weighted = loss * weights[0] + log_prob * weights[1]
        if entropy_gradient:
            weighted = weighted + entropy * weights[2]
        weighted.sum().backward()
        return {"loss": loss, "log_prob": log_prob, "entropy": entropy, **one.gradients()}

    ours, plain, exact = (made.to(d, train=train) for d in (dtype, dtype, torch.float64))
    with poisoned_buffers():
        outputs = linear_log_probs(
            ours.hidden,
            ours.weight,
            ours.labels,
            bias=ours.bias,
            options=options,
            entropy=True,
            entropy_gradient=entropy_gradient,
            chunk_tokens=5,
            impl=impl,
        )
        mine = measured(ours, outputs[:3])
    assert_no_worse_than(
        mine, measured(plain, eager(plain, options)), measured(exact, eager(exact, options))
    )
    assert outputs.entropy.requires_grad == entropy_gradient
    assert not outputs.is_top1.requires_grad


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_reference_passes_gradcheck_in_fp64(options) -> None:
    one = head(5, 11, 4, torch.float64).to(torch.float64)

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return linear_log_probs(
            hidden,
            weight,
            one.labels,
            bias=bias,
            options=options,
            entropy=True,
            entropy_gradient=True,
            chunk_tokens=2,
        )[:3]

    assert torch.autograd.gradcheck(outputs, one[:3], fast_mode=True)


@pytest.mark.parametrize("num_items", [None, 13, torch.tensor(13.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frozen_heads_gradient_is_rounded_no_more_often_than_eagers(num_items, dtype) -> None:
    made = head(13, 37, 24, dtype, bias=False)
    made.labels.clamp_min_(0)
    ours, plain = (made.to(dtype, train="hidden") for _ in range(2))
    linear_cross_entropy(ours.hidden, ours.weight, ours.labels, num_items=num_items).backward()
    eager(plain, PLAIN)[0].mean().backward()
    # One rounding more would differ by a third of the dtype's epsilon.
    assert relative_error(ours.hidden.grad, plain.hidden.grad) < 0.1 * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", IMPLS)
def test_any_chunk_size_gives_the_same_loss_and_gradients(impl) -> None:
    made = head(13, 37, 24, torch.float32)
    results = []
    for chunk in (1, 3, 8, 9, 100, None):
        one = made.to(torch.float32)
        loss = linear_cross_entropy(
            one.hidden, one.weight, one.labels, bias=one.bias, chunk_tokens=chunk, impl=impl
        )
        loss.backward()
        results.append((loss.detach(), one.hidden.grad, one.weight.grad, one.bias.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_never_reach_the_head_and_get_no_gradient(impl) -> None:
    made = head(10, 37, 24, torch.float32)
    ignored = made.labels == -100
    made.hidden[ignored] = float("nan")
    one = made.to(torch.float32)
    out = linear_log_probs(
        one.hidden, one.weight, one.labels, bias=one.bias, entropy=True, impl=impl
    )
    out.loss.sum().backward()
    for values in (out.loss, out.log_prob, out.entropy, out.is_top1):
        assert not values[ignored].any()
        assert values.isfinite().all()
    assert not one.hidden.grad[ignored].any()
    assert all(g.isfinite().all() for g in one.gradients().values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(4,), (0,), (2, 0)])
@pytest.mark.parametrize("train", ["hidden", "hidden weight bias"])
def test_without_any_label_the_sum_is_zero_the_mean_is_nan_and_gradients_are_zero(
    impl, shape, train
) -> None:
    labels = torch.full(shape, -100)
    made = Head(torch.randn(*shape, 8), torch.randn(5, 8), torch.randn(5), labels)
    for num_items, claim in ((3, lambda loss: loss == 0), (None, torch.isnan)):
        one = made.to(torch.float32, train=train)
        loss = linear_cross_entropy(
            one.hidden, one.weight, labels, bias=one.bias, num_items=num_items, impl=impl
        )
        loss.backward()
        assert claim(loss)
        assert all(not g.any() for g in one.gradients().values() if g is not None)
        assert one.hidden.grad.shape == one.hidden.shape


def test_the_mean_is_over_trained_labels_as_in_f_cross_entropy() -> None:
    one = head(12, 37, 24, torch.float64, bias=False)
    ours = linear_cross_entropy(one.hidden, one.weight, one.labels)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, F.cross_entropy(one.hidden @ one.weight.t(), one.labels))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_inputs_give_the_same_bits(impl) -> None:
    made = head(13, 37, 24, torch.bfloat16)
    bits = []
    for _ in range(2):
        one = made.to(torch.bfloat16)
        loss = linear_cross_entropy(one.hidden, one.weight, one.labels, chunk_tokens=4, impl=impl)
        loss.backward()
        bits.append((loss.detach(), one.hidden.grad, one.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


@pytest.mark.parametrize("num_items", [5, torch.tensor(5.0), torch.tensor(5)], ids=str)
def test_num_items_divides_loss_and_gradient_and_the_loss_can_be_scaled_in_place(num_items) -> None:
    made = head(9, 37, 24, torch.float32, bias=False)
    one, plain = (made.to(torch.float32, train="hidden") for _ in range(2))
    loss = linear_cross_entropy(one.hidden, one.weight, one.labels, num_items=num_items)
    loss *= 3  # as Trainer does
    loss.backward()
    (eager(plain, PLAIN)[0].sum() * 3 / 5).backward()
    torch.testing.assert_close(one.hidden.grad, plain.hidden.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_fp16_gradients_do_not_vanish_before_the_loss_scale_reaches_them(impl) -> None:
    made = head(9, 37, 24, torch.float16, bias=False)
    ours, exact = made.to(torch.float16), made.to(torch.float64)
    loss = linear_cross_entropy(
        ours.hidden, ours.weight, ours.labels, num_items=1_000_000, impl=impl
    )
    (loss * 65536.0).backward()
    (eager(exact, PLAIN)[0].sum() * 0.065536).backward()
    for mine, truth in zip(ours.gradients().values(), exact.gradients().values(), strict=True):
        if truth is not None:
            torch.testing.assert_close(mine.double(), truth, rtol=4e-3, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_of_any_stride_and_batch_shape_are_taken(impl) -> None:
    wide = torch.randn(2, 3, 40)
    labels = torch.randint(11, (2, 3))
    weight = torch.randn(22, 24)[::2]
    hidden = wide[:, :, 8:32].requires_grad_()
    out = linear_log_probs(hidden, weight, labels, impl=impl)
    assert out.loss.shape == out.is_top1.shape == (2, 3)
    (mine,) = torch.autograd.grad(out.loss.sum(), hidden)
    loss = F.cross_entropy((hidden @ weight.t()).view(-1, 11), labels.view(-1), reduction="sum")
    torch.testing.assert_close(mine, torch.autograd.grad(loss, hidden)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_is_top1_is_what_argmax_says_also_among_equal_logits(impl) -> None:
    hidden = torch.eye(4)
    weight = torch.tensor([[1.0, 2, 0, 5], [1, 2, 1, 0], [0, 2, 1, 0]])  # logits = weight^T
    labels = torch.tensor([1, 0, 2, 0])
    out = linear_log_probs(hidden, weight, labels, impl=impl)
    assert out.is_top1.tolist() == [False, True, False, True]
    assert torch.equal(out.is_top1, (hidden @ weight.t()).argmax(-1) == labels)


@pytest.mark.parametrize("impl", IMPLS)
def test_classes_masked_by_a_bias_of_minus_infinity_have_no_share(impl) -> None:
    made = head(5, 4100, 16, torch.float32)
    made.bias[30:] = float("-inf")
    made.labels.clamp_(max=29)
    one, few = made.to(torch.float32), made.to(torch.float32)
    ours = linear_log_probs(
        one.hidden, one.weight, one.labels, bias=one.bias, entropy=True,
        entropy_gradient=True, impl=impl,
    )  # fmt: skip
    truth = eager(Head(few.hidden, few.weight[:30], few.bias[:30], few.labels), PLAIN)
    for mine, exact in zip(ours[:3], truth, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)
    (ours.log_prob.sum() + ours.entropy.sum()).backward()
    (truth[1].sum() + truth[2].sum()).backward()
    torch.testing.assert_close(one.hidden.grad, few.hidden.grad, rtol=1e-4, atol=1e-5)


def test_a_label_outside_the_vocabulary_makes_the_triton_loss_nan_and_reads_nothing() -> None:
    one = head(3, 11, 4, torch.float32, bias=False)
    labels = torch.tensor([3, 10**9, 5])
    out = linear_log_probs(one.hidden, one.weight, labels, impl="triton")
    assert out.loss.isnan().tolist() == [False, True, False]
    assert not out.is_top1[1]


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters_dtypes(
    impl,
) -> None:
    made = head(13, 37, 24, torch.bfloat16)
    results = []
    for run in ("ours", "eager", "truth"):
        dtype = torch.float64 if run == "truth" else torch.float32
        one = made.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=run != "truth"):
            if run == "ours":
                total = linear_log_probs(
                    one.hidden, one.weight, one.labels, bias=one.bias, impl=impl
                ).loss.sum()
            else:
                total = eager(one, PLAIN)[0].sum()
        total.backward()
        assert one.hidden.grad.dtype == one.weight.grad.dtype == dtype
        results.append({"loss": total, **one.gradients()})
    assert_no_worse_than(*results, floor=8e-3)


def test_an_fp32_head_of_16_bit_hidden_states_gets_an_fp32_gradient() -> None:
    made = head(9, 37, 24, torch.bfloat16, bias=False)
    hidden, weight = made.hidden.requires_grad_(), made.weight.float().requires_grad_()
    linear_cross_entropy(hidden, weight, made.labels).backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [32_000, 128_256, 151_937])
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_real_vocabularies_are_no_worse_than_eager_on_cuda(dtype, V, options) -> None:
    made = head(1000, V, 512, dtype, bias=False, device="cuda")

    def measured(one: Head, loss: Tensor) -> dict[str, Tensor | None]:
        loss.backward()
        return {"loss": loss, **one.gradients()}

    ours, plain, exact = (made.to(d) for d in (dtype, dtype, torch.float64))
    loss = linear_cross_entropy(
        ours.hidden, ours.weight, ours.labels, options=options, num_items=667, chunk_tokens=256
    )
    assert_no_worse_than(
        measured(ours, loss),
        measured(plain, eager(plain, options)[0].sum() / 667),
        measured(exact, eager(exact, options)[0].sum() / 667),
    )
