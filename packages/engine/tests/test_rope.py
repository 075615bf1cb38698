"""Rope against fp64 truth, both implementations, and the laws of its Protocol."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hotloop_core.errors import ConfigError, UnsupportedError
from hotloop_core.kernels import HeadNorm
from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.rope import rope
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("reference", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Shape:
    T: int
    H: int
    G: int
    K: int
    R: int
    interleaved: bool = False
    normed: bool = False


SHAPES = (
    Shape(T=1, H=2, G=1, K=64, R=64),
    Shape(T=9, H=3, G=1, K=16, R=16, interleaved=True),
    Shape(T=17, H=5, G=2, K=100, R=100, normed=True),
    Shape(T=7, H=4, G=4, K=24, R=12),
    Shape(T=5, H=4, G=2, K=24, R=20, interleaved=True, normed=True),
    Shape(T=3, H=2, G=3, K=24, R=8, normed=True),
)
ids = [f"{s.T}x{s.H}+{s.G}x{s.R}of{s.K}{'i' * s.interleaved}{'n' * s.normed}" for s in SHAPES]


def eager_rope(q, k, cos, sin, wq, wk, shape):
    """As transformers writes it: the norm rounded to the dtype, then the rotation in the dtype."""

    def one(x, w):
        if shape.normed:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            x = w * wide.to(x.dtype)
        turned, kept = x[..., : shape.R], x[..., shape.R :]
        c, s = cos[:, None], sin[:, None]
        if shape.interleaved:
            half = shape.R // 2
            c, s = (t[..., :half].repeat_interleave(2, dim=-1) for t in (c, s))
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            other = torch.cat((-second, first), dim=-1)
        return torch.cat((turned * c + other * s, kept), dim=-1)

    return one(q, wq), one(k, wk)


def our_rope(impl):
    def function(q, k, cos, sin, wq, wk, shape):
        q_norm, k_norm = (HeadNorm(w_K=w, eps=1e-6) if shape.normed else None for w in (wq, wk))
        return rope(
            *(q, k, cos, sin),
            interleaved=shape.interleaved,
            q_norm=q_norm,
            k_norm=k_norm,
            impl=impl,
        )

    return function


def results(function, tensors, shape, dtype=None):
    """Outputs and gradients of q * dq + k * dk, computed in `dtype` from the same numbers."""
    q, k, cos, sin, wq, wk, dq, dk = (t.detach().to(dtype or t.dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in ((q, k, wq, wk) if shape.normed else (q, k))]
    outs = function(q, k, cos, sin, wq, wk, shape)
    gradients = torch.autograd.grad(outs, leaves, (dq, dk))
    names = ("q", "k", "dq", "dk", "dwq", "dwk")
    return dict(zip(names, (*outs, *gradients), strict=False))


def make(shape, dtype):
    def random(*size):
        return torch.randn(*size, device=DEVICE)

    angles = random(shape.T, shape.R // 2).repeat(1, 2) * 9  # any positions
    q, dq = random(2, shape.T, shape.H, shape.K)
    k, dk = random(2, shape.T, shape.G, shape.K)
    wq, wk = random(2, shape.K)
    return [t.to(dtype) for t in (q, k, angles.cos(), angles.sin(), wq, wk, dq, dk)]


def check(impl, shape, dtype):
    tensors = make(shape, dtype)
    with poisoned_buffers():
        ours = results(our_rope(impl), tensors, shape)
    eager = results(eager_rope, tensors, shape)
    truth = results(eager_rope, tensors, shape, torch.float64)
    assert_no_worse_than(ours, eager, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_rope_and_its_gradients_are_no_worse_than_eager(impl, dtype, shape):
    check(impl, shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    "H, G, K, R", [(32, 8, 128, 128), (28, 4, 128, 128), (16, 8, 256, 256), (128, 1, 192, 64)]
)
def test_rope_kernel_is_no_worse_than_eager_at_real_sizes(dtype, interleaved, normed, H, G, K, R):
    check("triton", Shape(1000, H, G, K, R, interleaved, normed), dtype)


@pytest.mark.gpu
def test_rope_kernel_addresses_more_than_two_to_the_31_elements():
    T = 2**31 // 4096 + 8
    q = torch.zeros(T, 32, 128, device="cuda", dtype=torch.bfloat16)
    q[-1] = torch.randn(32, 128, device="cuda")
    k = q[:, :8]
    cos, sin = torch.randn(2, T, 128, device="cuda")
    expected = rope(q[-1:], k[-1:], cos[-1:], sin[-1:], impl="reference")
    op = implementation("rope", q.device, "triton")
    q_out, k_out = op.forward(q, k, cos, sin, out_k=torch.empty_like(k))
    torch.testing.assert_close(q_out[-1:], expected[0])
    torch.testing.assert_close(k_out[-1:], expected[1])
    assert not q_out[:-1].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if not s.normed], ids=str)
def test_rope_turns_back_in_place(impl, shape):
    q, k, cos, sin, *_ = make(shape, torch.float64)
    op = implementation("rope", DEVICE, impl)
    q_in, k_in = q.clone(), k.clone()
    options = {"interleaved": shape.interleaved, "out_q": q, "out_k": k}
    q_out, k_out = op.forward(q, k, cos, sin, **options)
    assert (q_out.data_ptr(), k_out.data_ptr()) == (q.data_ptr(), k.data_ptr())
    assert not torch.equal(q, q_in)
    op.backward(q, k, cos, sin, **options)  # of a rotation the transpose is the inverse
    torch.testing.assert_close(q, q_in)
    torch.testing.assert_close(k, k_in)


@pytest.mark.parametrize("impl", IMPLS)
def test_rope_works_on_heads_inside_one_wide_buffer_and_touches_nothing_beside(impl):
    T, H, G, K = 5, 3, 2, 16
    wide = torch.randn(T, (H + 2 * G) * K + 9, device=DEVICE)
    q, k = wide[:, : H * K].view(T, H, K), wide[:, H * K : (H + G) * K].view(T, G, K)
    values = wide[:, (H + G) * K :].clone()
    cos, sin = torch.randn(2, T, K, device=DEVICE)
    op = implementation("rope", DEVICE, impl)
    expected = op.forward(q.contiguous(), k.contiguous(), cos, sin)
    op.forward(q, k, cos, sin, out_q=q, out_k=k)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    assert torch.equal(wide[:, (H + G) * K :], values)


@pytest.mark.parametrize("impl", IMPLS)
def test_rope_takes_heads_first_and_writes_tokens_first(impl):
    q, k = torch.randn(2, 4, 5, 16, device=DEVICE)
    cos, sin = torch.randn(2, 5, 16, device=DEVICE)
    op = implementation("rope", DEVICE, impl)
    q_out, k_out = op.forward(q.transpose(0, 1), k.transpose(0, 1), cos, sin)
    expected = op.forward(q.transpose(0, 1).contiguous(), k.transpose(0, 1).contiguous(), cos, sin)
    assert torch.equal(q_out, expected[0])
    assert torch.equal(k_out, expected[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_rope_backward_with_norms_may_overwrite_the_gradients(impl):
    shape = SHAPES[4]
    q, k, cos, sin, wq, wk, dq, dk = make(shape, torch.float32)
    op = implementation("rope", DEVICE, impl)
    options = {
        "interleaved": shape.interleaved,
        "q_THK": q,
        "k_TGK": k,
        "q_norm": HeadNorm(w_K=wq, eps=1e-6, offset=1.0),
        "k_norm": HeadNorm(w_K=wk, eps=1e-6),
        "need_dw": True,
    }
    expected = op.backward(dq.clone(), dk.clone(), cos, sin, **options)
    actual = op.backward(dq, dk, cos, sin, **options, out_q=dq, out_k=dk)
    assert actual[0].data_ptr() == dq.data_ptr()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_rope_norms_q_alone_and_k_without_a_weight(impl):
    q, k, cos, sin, wq, *_ = make(SHAPES[0], torch.float32)
    norm = HeadNorm(w_K=wq.requires_grad_(), eps=1e-6)
    bare = HeadNorm(w_K=None, eps=1e-6)
    q_out, k_out = rope(q, k, cos, sin, q_norm=norm, impl=impl)
    assert torch.equal(k_out, rope(q, k, cos, sin, impl=impl)[1])
    assert torch.autograd.grad(q_out.sum(), wq)[0].shape == wq.shape
    _, k_out = rope(q, k, cos, sin, q_norm=norm, k_norm=bare, impl=impl)
    normed = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(k_out, rope(q, normed, cos, sin, impl=impl)[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_rope_repeats_one_table_over_a_batch_and_pairs_columns_as_promised(impl):
    q, k = torch.randn(2, 5, 3, 16, device=DEVICE), torch.randn(2, 5, 1, 16, device=DEVICE)
    cos, sin = torch.randn(2, 1, 5, 16, device=DEVICE)  # both halves of the columns differ
    whole = rope(q, k, cos.expand(2, -1, -1), sin.expand(2, -1, -1), impl=impl)
    once = rope(q, k, cos, sin, impl=impl)
    assert torch.equal(whole[0], once[0])
    first, second = q.chunk(2, dim=-1)
    truth = q * cos[..., None, :] + torch.cat((-second, first), -1) * sin[..., None, :]
    torch.testing.assert_close(once[0], truth)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(rope(q, k, cos, sin, impl=impl)[0].sum(), q)
    truth = q * cos[..., None, :]
    truth = truth + torch.cat((-q[..., 8:], q[..., :8]), -1) * sin[..., None, :]
    torch.testing.assert_close(dq, torch.autograd.grad(truth.sum(), q)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_rope_of_no_tokens_gives_zero_weight_gradients(impl):
    q, k, cos, sin = (torch.empty(0, 2, 16, device=DEVICE) for _ in range(4))
    w = torch.ones(16, device=DEVICE, requires_grad=True)
    norm = HeadNorm(w_K=w, eps=1e-6)
    q_out, _ = rope(q, k, cos[:, 0], sin[:, 0], q_norm=norm, impl=impl)
    assert q_out.shape == q.shape
    assert torch.equal(torch.autograd.grad(q_out.sum(), w)[0], torch.zeros_like(w))


@pytest.mark.parametrize("impl", IMPLS)
def test_rope_gives_the_same_bits_twice(impl):
    tensors = make(SHAPES[2], torch.bfloat16)
    first, second = (results(our_rope(impl), tensors, SHAPES[2]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rope_refuses_what_does_not_fit():
    q, k, table = torch.zeros(6, 2, 16), torch.zeros(6, 1, 16), torch.zeros(6, 16)
    with pytest.raises(ConfigError, match="may differ in heads only"):
        rope(q, k[:5], table, table)
    with pytest.raises(ConfigError, match="rows that divide the tokens"):
        rope(q, k, table[:4], table[:4])
    with pytest.raises(ConfigError, match="an even number of columns, 2 to 16"):
        rope(q, k, torch.zeros(6, 18), torch.zeros(6, 18))
    with pytest.raises(ConfigError, match="requires a gradient"):
        rope(q, k, table.clone().requires_grad_(), table)


def test_rope_kernel_refuses_what_it_would_misread():
    op = implementation("rope", DEVICE, "triton")
    q, table = torch.zeros(6, 16, 2, device=DEVICE), torch.zeros(6, 16, device=DEVICE)
    with pytest.raises(UnsupportedError, match="the last must be 1"):
        op.forward(q.mT, q.mT, table, table)
    with pytest.raises(ConfigError, match="T a multiple of P"):
        op.forward(q, q, table[:4], table[:4])
