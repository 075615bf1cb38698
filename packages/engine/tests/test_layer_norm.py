"""LayerNorm against fp64 truth, both implementations, and the laws of its Protocol."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hotloop_core.errors import ConfigError, UnsupportedError
from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.layer_norm import layer_norm
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("reference", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def eager_layer_norm(x, w, b, *, eps, residual):
    s = x if residual is None else x + residual
    y = F.layer_norm(s, s.shape[-1:], w, b, eps)
    return y if residual is None else (y, s)


def results(function, tensors, *, dtype=None, **options):
    """Outputs and gradients of y * dy + s * ds, computed in `dtype` from the same numbers."""
    x, w, b, residual, dy, ds = (t if t is None else t.to(dtype or t.dtype) for t in tensors)
    leaves = [t.detach().requires_grad_() for t in (x, w, b, residual) if t is not None]
    x, w, b, *rest = leaves
    residual = rest[0] if rest else None
    out = function(x, w, b, eps=1e-5, residual=residual, **options)
    y, s = (out, None) if residual is None else out
    outs, grads = ([y], [dy]) if s is None else ([y, s], [dy, ds])
    gradients = torch.autograd.grad(outs, leaves, grads)
    return {"y": y, "s": s} | dict(zip(("dx", "dw", "db", "dr"), gradients, strict=False))


def make(T, D, dtype, *, residual=True):
    x, r, dy, ds = (torch.randn(4, T, D, device=DEVICE) * 3 + 1).to(dtype)
    w, b = torch.randn(2, D, device=DEVICE).to(dtype)
    return x, w, b, r if residual else None, dy, ds


def check(impl, T, D, dtype, residual):
    tensors = make(T, D, dtype, residual=residual)
    with poisoned_buffers():
        ours = results(layer_norm, tensors, impl=impl)
    eager = results(eager_layer_norm, tensors)
    truth = results(eager_layer_norm, tensors, dtype=torch.float64)
    assert_no_worse_than(ours, eager, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, D", [(1, 64), (63, 100), (35, 1000)])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_layer_norm_and_its_gradients_are_no_worse_than_eager(impl, dtype, T, D, residual):
    check(impl, T, D, dtype, residual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("T, D", [(1000, 4096), (2049, 3584), (63, 16384), (5, 40000)])
def test_layer_norm_kernel_is_no_worse_than_eager_at_real_sizes(dtype, T, D):
    check("triton", T, D, dtype, True)


@pytest.mark.parametrize("impl", IMPLS)
def test_layer_norm_of_a_large_mean_keeps_its_variance(impl):
    x = torch.randn(4, 100, device=DEVICE) + 3000
    y = layer_norm(x, None, None, eps=1e-5, impl=impl)
    truth = F.layer_norm(x.double(), (100,), eps=1e-5)
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=2e-3)  # x itself is exact to 1e-4


@pytest.mark.parametrize("impl", IMPLS)
def test_layer_norm_writes_only_inside_strided_outputs(impl):
    op = implementation("layer_norm", DEVICE, impl)
    x, w, b, r, *_ = make(5, 100, torch.float32)
    y_wide, s_wide = torch.full((2, 5, 116), 7.0, device=DEVICE)
    op.forward(x, w, b, eps=1e-5, residual_TD=r, out=y_wide[:, 8:108], sum_out=s_wide[:, :100])
    y, _, _, s = op.forward(x, w, b, eps=1e-5, residual_TD=r)
    assert torch.equal(y_wide[:, 8:108], y)
    assert torch.equal(s_wide[:, :100], s)
    for beside in (y_wide[:, :8], y_wide[:, 108:], s_wide[:, 100:]):
        assert bool((beside == 7.0).all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alias", ["dy", "dresidual"])
def test_layer_norm_backward_may_overwrite_its_gradients(impl, alias):
    op = implementation("layer_norm", DEVICE, impl)
    x, w, b, dresidual, dy, _ = make(7, 100, torch.bfloat16)
    _, mean, rstd, s = op.forward(x, w, b, eps=1e-5)
    options = {"dresidual_TD": dresidual, "need_dw": True}
    expected = op.backward(dy, s, w, mean, rstd, **options)
    out = {"dy": dy, "dresidual": dresidual}[alias]
    actual = op.backward(dy, s, w, mean, rstd, **options, out=out)
    assert actual[0].data_ptr() == out.data_ptr()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_layer_norm_bias_gets_a_gradient_without_a_weight(impl):
    x, b = torch.randn(2, 3, 64, device=DEVICE), torch.zeros(64, device=DEVICE, requires_grad=True)
    y = layer_norm(x, None, b, eps=1e-5, impl=impl)
    (db,) = torch.autograd.grad(y.sum(), b)  # the gradient of a sum has stride 0
    assert torch.equal(db, torch.full_like(b, 6.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_layer_norm_of_no_tokens_gives_zero_weight_gradients(impl):
    x = torch.empty(0, 64, device=DEVICE)
    w, b = torch.ones(2, 64, device=DEVICE, requires_grad=True).unbind()
    grads = torch.autograd.grad(layer_norm(x, w, b, eps=1e-5, impl=impl).sum(), (w, b))
    assert all(torch.equal(g, torch.zeros_like(w)) for g in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_layer_norm_gives_the_same_bits_twice(impl):
    tensors = make(63, 100, torch.bfloat16)
    first, second = (results(layer_norm, tensors, impl=impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layer_norm_refuses_shapes_that_do_not_fit():
    x = torch.zeros(2, 64)
    with pytest.raises(ConfigError, match="b has shape"):
        layer_norm(x, torch.ones(64), torch.ones(63), eps=1e-5)
    with pytest.raises(ConfigError, match="residual has shape"):
        layer_norm(x, None, None, eps=1e-5, residual=torch.zeros(1, 64))


def test_layer_norm_kernel_refuses_what_it_would_misread():
    op = implementation("layer_norm", DEVICE, "triton")
    with pytest.raises(UnsupportedError, match="the last must be 1"):
        op.forward(torch.zeros(64, 2, device=DEVICE).T, None, None, eps=1e-5)
