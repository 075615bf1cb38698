"""Gated linear units against fp64 truth, both implementations, and the laws of the Protocol."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hotloop_core.errors import ConfigError, UnsupportedError
from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.glu import glu
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers

# NumPy warns in Triton's interpreter where exp(-x) rightly overflows, and the sigmoid becomes 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("reference", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
EAGER = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def eager_glu(gate, up, *, activation):
    return EAGER[activation](gate) * up


def results(function, tensors, *, dtype=None, **options):
    """The output and the gradients of h * dh, computed in `dtype` from the same numbers."""
    gate, up, dh = (t.detach().to(dtype or t.dtype) for t in tensors)
    leaves = (gate.requires_grad_(), up.requires_grad_())
    h = function(*leaves, **options)
    dgate, dup = torch.autograd.grad(h, leaves, dh)
    return {"h": h, "dgate": dgate, "dup": dup}


def make(T, I_size, dtype):
    return tuple((torch.randn(3, T, I_size, device=DEVICE) * 3).to(dtype))


def check(impl, T, I_size, dtype, activation):
    tensors = make(T, I_size, dtype)
    with poisoned_buffers():
        ours = results(glu, tensors, activation=activation, impl=impl)
    eager = results(eager_glu, tensors, activation=activation)
    truth = results(eager_glu, tensors, activation=activation, dtype=torch.float64)
    assert_no_worse_than(ours, eager, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("T, I_size", [(1, 64), (63, 100), (5, 2500)])
def test_glu_and_its_gradients_are_no_worse_than_eager(impl, dtype, activation, T, I_size):
    check(impl, T, I_size, dtype, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("activation", EAGER)
@pytest.mark.parametrize("T, I_size", [(1000, 14336), (333, 18944)])
def test_glu_kernel_is_no_worse_than_eager_at_real_sizes(dtype, activation, T, I_size):
    check("triton", T, I_size, dtype, activation)


@pytest.mark.gpu
def test_glu_kernel_addresses_more_than_two_to_the_31_elements():
    gate = torch.zeros(2**31 // 16384 + 8, 16384, device="cuda", dtype=torch.bfloat16)
    gate[-1] = 1.0
    up = torch.ones_like(gate)
    implementation("glu", gate.device, "triton").forward(gate, up, activation="silu", out=up)
    assert not up[:-1].any()
    assert bool((up[-1] == F.silu(gate[-1])).all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", EAGER)
def test_glu_stays_finite_at_the_ends_of_fp16(impl, activation):
    gate = torch.tensor([[-65504.0, -30.0, 0.0, 30.0, 65504.0]], device=DEVICE).half()
    up = torch.ones_like(gate)
    ours = results(glu, (gate, up, up), activation=activation, impl=impl)
    ends = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=DEVICE)
    torch.testing.assert_close(ours["dgate"].float(), ends, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours["h"], gate.clamp(min=0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_glu_backward_in_place_leaves_h_dgate_and_dup_and_touches_nothing_beside(impl):
    op = implementation("glu", DEVICE, impl)
    wide = torch.randn(7, 220, device=DEVICE)
    gate, up = wide[:, :100], wide[:, 100:200]  # side by side in one buffer, as a block has them
    dh = torch.randn(8, 100, device=DEVICE)[1:]
    beside = wide[:, 200:].clone()
    expected = results(glu, (gate.clone(), up.clone(), dh), activation="gelu", impl=impl)
    op.backward_(dh, gate, up, activation="gelu")
    assert torch.equal(dh, expected["h"])
    assert torch.equal(gate, expected["dgate"])
    assert torch.equal(up, expected["dup"])
    assert torch.equal(wide[:, 200:], beside)


@pytest.mark.parametrize("impl", IMPLS)
def test_glu_forward_writes_only_inside_a_strided_output_that_may_be_an_input(impl):
    op = implementation("glu", DEVICE, impl)
    gate, up, _ = make(5, 100, torch.float32)
    expected = op.forward(gate, up, activation="silu")
    wide = torch.full((5, 116), 7.0, device=DEVICE)
    op.forward(gate, up, activation="silu", out=wide[:, 8:108])
    assert torch.equal(wide[:, 8:108], expected)
    assert bool((wide[:, :8] == 7.0).all())
    assert bool((wide[:, 108:] == 7.0).all())
    op.forward(gate, up, activation="silu", out=up)
    assert torch.equal(up, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_glu_backward_leaves_its_inputs_and_takes_expanded_gradients(impl):
    gate, up, _ = (t.view(1, 6, 64).requires_grad_() for t in make(6, 64, torch.float32))
    before = gate.detach().clone(), up.detach().clone()
    glu(gate, up, activation="silu", impl=impl).sum().backward()
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])
    torch.testing.assert_close(up.grad, F.silu(gate))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_glu_of_nothing_is_nothing(impl, shape):
    gate, up = torch.empty(2, *shape, device=DEVICE, requires_grad=True).unbind()
    h = glu(gate, up, activation="silu", impl=impl)
    assert h.shape == shape
    h.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_glu_gives_the_same_bits_twice(impl):
    tensors = make(9, 100, torch.bfloat16)
    first, second = (results(glu, tensors, activation="silu", impl=impl) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_glu_refuses_what_it_does_not_know():
    x = torch.zeros(2, 64)
    with pytest.raises(ConfigError, match="unknown activation 'relu'; known: silu"):
        glu(x, x, activation="relu")
    with pytest.raises(ConfigError, match="must be equal"):
        glu(x, x[:1], activation="silu")
    with pytest.raises(UnsupportedError, match="the last must be 1"):
        implementation("glu", DEVICE, "triton").forward(
            torch.zeros(64, 2, device=DEVICE).T, x.to(DEVICE).T, activation="silu"
        )
