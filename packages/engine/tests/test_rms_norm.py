"""RMSNorm against fp64 truth, both implementations, and the laws of its Protocol."""

from __future__ import annotations

import pytest
import torch
from hotloop_core.errors import ConfigError, NoImplementationError, UnsupportedError
from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.rms_norm import rms_norm
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("reference", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def eager_rms_norm(x, w, *, eps, offset, residual):
    """As transformers writes it: Llama's for offset 0, Gemma's for offset 1."""
    s = x if residual is None else x + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    gemma = (normed * (offset + w.to(wide.dtype))).to(x.dtype)
    y = gemma if offset else w * normed.to(x.dtype)
    return y if residual is None else (y, s)


def results(function, tensors, *, eps=1e-6, offset=0.0, dtype=None, **options):
    """Outputs and gradients of y * dy + s * ds, computed in `dtype` from the same numbers."""
    x, w, residual, dy, ds = (
        t if t is None or dtype is None else t.to(dtype) for t in tensors.values()
    )
    leaves = [t.detach().requires_grad_() for t in (x, w, residual) if t is not None]
    x, w, *rest = leaves
    residual = rest[0] if rest else None
    out = function(x, w, eps=eps, offset=offset, residual=residual, **options)
    y, s = (out, None) if residual is None else out
    outs, grads = ([y], [dy]) if s is None else ([y, s], [dy, ds])
    names = ("dx", "dw", "dresidual")
    gradients = torch.autograd.grad(outs, leaves, grads)
    return {"y": y, "s": s} | dict(zip(names, gradients, strict=False))


def make(T, D, dtype, *, residual=True, device=DEVICE):
    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    return {
        "x": random(T, D) * 3,
        "w": random(D),
        "residual": random(T, D) if residual else None,
        "dy": random(T, D),
        "ds": random(T, D),
    }


def check(impl, T, D, dtype, offset, residual, device=DEVICE):
    tensors = make(T, D, dtype, residual=residual, device=device)
    with poisoned_buffers():
        ours = results(rms_norm, tensors, offset=offset, impl=impl)
    eager = results(eager_rms_norm, tensors, offset=offset)
    truth = results(eager_rms_norm, tensors, offset=offset, dtype=torch.float64)
    assert_no_worse_than(ours, eager, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, D, offset", [(1, 64, 0.0), (63, 100, 1.0), (35, 1000, 0.0)])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_rms_norm_and_its_gradients_are_no_worse_than_eager(impl, dtype, T, D, offset, residual):
    check(impl, T, D, dtype, offset, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("T, D", [(1000, 4096), (2049, 3584), (63, 16384), (5, 40000), (3, 65536)])
def test_rms_norm_kernel_is_no_worse_than_eager_at_real_sizes(dtype, T, D):
    check("triton", T, D, dtype, 0.0, True)


@pytest.mark.gpu
def test_rms_norm_kernel_addresses_more_than_two_to_the_31_elements():
    D = 16384
    x = torch.zeros(2**31 // D + 8, D, device="cuda", dtype=torch.bfloat16)
    x[-8:] = torch.randn(8, D, device="cuda")
    op = implementation("rms_norm", x.device, "triton")
    y, rstd, _ = op.forward(x, None, eps=1e-6)
    expected, *_ = implementation("rms_norm", x.device, "reference").forward(x[-8:], None, eps=1e-6)
    assert torch.allclose(y[-8:], expected, rtol=1e-2, atol=1e-2)
    assert not y[:-8].any()
    op.backward(y, x, None, rstd, out=y)
    assert y[-8:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_rms_norm_writes_only_inside_strided_outputs(impl):
    op = implementation("rms_norm", DEVICE, impl)
    x, w, residual, *_ = make(5, 100, torch.float32).values()
    y_wide, s_wide = torch.full((2, 5, 116), 7.0, device=DEVICE)
    y, rstd, s = op.forward(
        x, w, eps=1e-6, residual_TD=residual, out=y_wide[:, 8:108], sum_out=s_wide[:, :100]
    )
    expected, expected_rstd, expected_s = op.forward(x, w, eps=1e-6, residual_TD=residual)
    assert y.data_ptr() == y_wide[:, 8:].data_ptr()
    assert torch.equal(y_wide[:, 8:108], expected)
    assert torch.equal(s_wide[:, :100], expected_s)
    assert torch.equal(rstd, expected_rstd)
    for beside in (y_wide[:, :8], y_wide[:, 108:], s_wide[:, 100:]):
        assert bool((beside == 7.0).all())
    assert s.data_ptr() == s_wide.data_ptr()


@pytest.mark.parametrize("impl", IMPLS)
def test_rms_norm_reads_rows_of_any_stride(impl):
    op = implementation("rms_norm", DEVICE, impl)
    wide = torch.randn(9, 150, device=DEVICE)
    x, dy, w = wide[1:, 3:103], wide[:8, 50:], wide[0, :100]
    y, rstd, _ = op.forward(x, w, eps=1e-6)
    ds, dw = op.backward(dy, x, w, rstd, need_dw=True)
    y_too, rstd_too, _ = op.forward(x.contiguous(), w.contiguous(), eps=1e-6)
    ds_too, dw_too = op.backward(dy.contiguous(), x.contiguous(), w, rstd_too, need_dw=True)
    for mine, same in ((y, y_too), (rstd, rstd_too), (ds, ds_too), (dw, dw_too)):
        assert torch.equal(mine, same)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alias", ["dy", "dresidual"])
def test_rms_norm_backward_may_overwrite_its_gradients(impl, alias):
    op = implementation("rms_norm", DEVICE, impl)
    x, w, dresidual, dy, _ = make(7, 100, torch.bfloat16).values()
    _, rstd, s = op.forward(x, w, eps=1e-6)
    expected = op.backward(dy, s, w, rstd, dresidual_TD=dresidual, need_dw=True)
    out = {"dy": dy, "dresidual": dresidual}[alias]
    ds, dw = op.backward(dy, s, w, rstd, dresidual_TD=dresidual, need_dw=True, out=out)
    assert ds.data_ptr() == out.data_ptr()
    assert torch.equal(ds, expected[0])
    assert torch.equal(dw, expected[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_rms_norm_of_no_tokens_gives_zero_weight_gradient(impl):
    x = torch.empty(2, 0, 64, device=DEVICE, requires_grad=True)
    w = torch.ones(64, device=DEVICE, requires_grad=True)
    y = rms_norm(x, w, eps=1e-6, impl=impl)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert dx.shape == y.shape == (2, 0, 64)
    assert torch.equal(dw, torch.zeros_like(w))


@pytest.mark.parametrize("impl", IMPLS)
def test_rms_norm_gives_the_same_bits_twice(impl):
    tensors = make(63, 100, torch.bfloat16)
    first, second = (results(rms_norm, tensors, impl=impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", IMPLS)
def test_rms_norm_takes_leading_dimensions_no_weight_and_expanded_gradients(impl):
    x = torch.randn(2, 3, 64, device=DEVICE, requires_grad=True)
    y = rms_norm(x, None, eps=1e-6, impl=impl)
    truth = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    assert y.shape == x.shape
    torch.testing.assert_close(y, truth)
    (dx,) = torch.autograd.grad(y.sum(), x)  # the gradient of a sum has stride 0
    torch.testing.assert_close(dx, torch.autograd.grad(truth.sum(), x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_rms_norm_backward_when_only_the_sum_is_used(impl):
    x, _, residual, *_ = make(3, 64, torch.float32).values()
    x.requires_grad_()
    _, s = rms_norm(x, None, eps=1e-6, residual=residual, impl=impl)
    assert torch.equal(torch.autograd.grad(s.sum(), x)[0], torch.ones_like(x))


def test_rms_norm_adds_a_branch_of_another_dtype_to_an_fp32_stream():
    x = torch.randn(3, 64, requires_grad=True)
    branch = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    y, s = rms_norm(x, None, eps=1e-6, residual=branch)
    assert torch.equal(s, x + branch)
    dx, dbranch = torch.autograd.grad(y.square().sum() + s.sum(), (x, branch))
    assert (dx.dtype, dbranch.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(dbranch, dx.bfloat16())


def test_rms_norm_refuses_shapes_that_do_not_fit():
    x = torch.zeros(2, 64)
    with pytest.raises(ConfigError, match="w has shape"):
        rms_norm(x, torch.ones(63), eps=1e-6)
    with pytest.raises(ConfigError, match="residual has shape"):
        rms_norm(x, None, eps=1e-6, residual=torch.zeros(1, 64))


def test_rms_norm_refuses_an_implementation_that_it_does_not_have():
    with pytest.raises(NoImplementationError, match="no implementation 'cuda'"):
        rms_norm(torch.zeros(2, 64), None, eps=1e-6, impl="cuda")


def test_rms_norm_kernel_refuses_what_it_would_misread():
    op = implementation("rms_norm", DEVICE, "triton")
    with pytest.raises(UnsupportedError, match="the last must be 1"):
        op.forward(torch.zeros(64, 2, device=DEVICE).T, None, eps=1e-6)
    with pytest.raises(UnsupportedError, match="65,536 columns"):
        op.forward(torch.zeros(1, 65537, device=DEVICE), None, eps=1e-6)
