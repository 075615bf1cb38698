"""The mean logit and log sum p^2 that preference trainers log or weigh by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hotloop_core.kernels import HeadLossOptions
from hotloop_engine.ops.linear_cross_entropy import kernel, linear_log_probs
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers
from torch import Tensor

IMPLS = ["reference", "triton"]
OPTIONS = {
    "plain": HeadLossOptions(),
    "everything": HeadLossOptions(label_smoothing=0.1, softcap=3.0, scale=0.7, temperature=1.3),
}


def head(T: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden, weight, labels (every third ignored), bias."""
    labels = torch.randint(V, (T,))
    labels[2::3] = -100
    weight = (3 * torch.randn(V, D) / D**0.5).to(dtype)
    bias = (1 + torch.randn(V)).to(dtype)  # a mean near zero would be all cancellation
    return torch.randn(T, D).to(dtype), weight, labels, bias


def eager(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, options: HeadLossOptions
) -> dict[str, Tensor]:
    logits = F.linear(hidden, weight, bias) * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / options.temperature
    trained = labels != -100
    collision = z.softmax(-1).square().sum(-1).log()
    return {"mean_logit": z.mean(-1) * trained, "log_sum_sq_prob": collision * trained}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("T, V, D", [(1, 300, 8), (13, 37, 24), (6, 4100, 16)])
@pytest.mark.parametrize("train", [False, True])
def test_moments_are_no_worse_than_eager(impl, dtype, options, T, V, D, train) -> None:
    hidden, weight, labels, bias = head(T, V, D, dtype)
    with poisoned_buffers():
        out = linear_log_probs(
            hidden.requires_grad_(train), weight, labels, bias=bias,
            options=options, moments=True, chunk_tokens=4, impl=impl,
        )  # fmt: skip
    ours = {"mean_logit": out.mean_logit, "log_sum_sq_prob": out.log_sum_sq_prob}
    tensors = (hidden.detach(), weight, labels, bias)
    wide = (t.double() if t.is_floating_point() else t for t in tensors)
    # Few numbers out of rounded logits: eager's errors may cancel by luck, so there is a floor.
    floor = max(2e-6, torch.finfo(dtype).eps / 8)
    assert_no_worse_than(ours, eager(*tensors, options), eager(*wide, options), floor=floor)
    assert not any(values.requires_grad for values in ours.values())


def test_moments_are_none_unless_asked_for() -> None:
    hidden, weight, labels, _ = head(4, 11, 8, torch.float32)
    out = linear_log_probs(hidden, weight, labels)
    assert out.mean_logit is None
    assert out.log_sum_sq_prob is None


@pytest.mark.parametrize("impl", IMPLS)
def test_log_sum_sq_prob_goes_from_minus_log_v_to_zero(impl) -> None:
    """All classes alike, and one that has it all, with logits whose squares leave fp32."""
    weight = torch.zeros(5000, 2)
    weight[7, 1] = 1.0
    hidden = torch.tensor([[1.0, 0.0], [0.0, 200.0]])
    labels = torch.tensor([7, 7])
    out = linear_log_probs(hidden, weight, labels, moments=True, impl=impl)
    expected = torch.tensor([-torch.tensor(5000.0).log(), 0.0])
    torch.testing.assert_close(out.log_sum_sq_prob, expected)
    torch.testing.assert_close(out.mean_logit, torch.tensor([0.0, 200.0 / 5000]))


@pytest.mark.parametrize("impl", IMPLS)
def test_moments_change_no_bit_of_loss_or_gradient(impl) -> None:
    hidden, weight, labels, _ = head(13, 37, 24, torch.bfloat16)
    found = []
    for moments in (False, True):
        leaf = hidden.clone().requires_grad_()
        out = linear_log_probs(leaf, weight, labels, moments=moments, impl=impl)
        out.log_prob.sum().backward()
        found.append((out.log_prob.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("cap", [kernel.BOUND, 2 * kernel.BOUND])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_at_either_end_of_a_soft_cap_stay_finite_and_exact(cap, dtype) -> None:
    """All of 5,000 at the top, all at the bottom, one at the top; 900 is far outside, where dz is 0."""
    options = HeadLossOptions(softcap=cap)
    logits = torch.full((3, 5000), -900.0)
    logits[0], logits[2, 7] = 900.0, 900.0
    moments = torch.empty(2, 3)
    found = kernel.forward_(
        logits.to(dtype), torch.full((3,), 7), options=options, dloss_T=None,
        want_entropy=True, moments_2T=moments,
    )  # fmt: skip
    spread = torch.tensor(5000.0).log()
    assert found.entropy_T is not None
    torch.testing.assert_close(
        found.lse_T, torch.stack([cap + spread, spread - cap, spread * 0 + cap])
    )
    torch.testing.assert_close(
        found.loss_T, torch.stack([spread, spread, spread * 0]), atol=1e-5, rtol=1e-6
    )
    torch.testing.assert_close(found.entropy_T, found.loss_T, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(moments[1], -found.loss_T, atol=2e-5, rtol=1e-6)
