"""AdamW on 8-bit moments: against fp64 truth, beside bitsandbytes' own step on the same state."""

from __future__ import annotations

from dataclasses import fields, replace
from math import sqrt

import bitsandbytes as bnb
import pytest
import torch
from hotloop_core.kernels import AdamWOptions, EightBitTensor
from hotloop_engine.ops._select import implementation
from hotloop_engine.ops.adamw_8bit.reference import dequantise
from hotloop_testkit.numerics import assert_no_worse_than

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS = AdamWOptions(lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=5)
M_TABLE = bnb.functional.create_dynamic_map(signed=True).to(DEVICE)
V_TABLE = bnb.functional.create_dynamic_map(signed=False).to(DEVICE)
SIZES = [(1,), (255,), (256,), (3, 257), (16, 300), (4097,)]


def op(name):
    return implementation("adamw_8bit", DEVICE, name)


def tensors(dtype=torch.float32, sizes=SIZES, offset=0):
    """Parameters amid a training: moments of four steps, whose blocks differ in scale."""
    made = []
    for shape in sizes:
        n = torch.Size(shape).numel()
        scale = 10.0 ** torch.linspace(-6, 0, n, device=DEVICE)
        m, v = torch.randn(n, device=DEVICE) * scale, torch.rand(n, device=DEVICE) * scale**2
        m_codes, m_state = bnb.functional.quantize_blockwise(m, code=M_TABLE, blocksize=256)
        v_codes, v_state = bnb.functional.quantize_blockwise(v, code=V_TABLE, blocksize=256)
        room = torch.randn(2, offset + n, device=DEVICE).to(dtype)
        made.append(
            EightBitTensor(
                parameter=room[0, offset:].view(shape),
                gradient=(room[1, offset:] * scale).to(dtype).view(shape),
                m_codes=m_codes.view(shape),
                v_codes=v_codes.view(shape),
                m_absmax=m_state.absmax.float(),
                v_absmax=v_state.absmax.float(),
            )
        )
    return made


def copied(made):
    def copy(tensor):
        return replace(tensor, **{f.name: getattr(tensor, f.name).clone() for f in fields(tensor)})

    return [copy(tensor) for tensor in made]


def shifted(x):
    """x one element behind the start of its memory."""
    flat = x.flatten()
    return torch.cat([flat[:1], flat])[1:].view(x.shape)


def moments(tensor):
    return (
        dequantise(tensor.m_codes, tensor.m_absmax, M_TABLE),
        dequantise(tensor.v_codes, tensor.v_absmax, V_TABLE),
    )


def exact(tensor, options=OPTIONS):
    """(p, m, v) of the step in fp64, nothing rounded."""
    m, v = (moment.double() for moment in moments(tensor))
    g, p = tensor.gradient.flatten().double(), tensor.parameter.flatten().double()
    m = options.beta1 * m + (1 - options.beta1) * g
    v = options.beta2 * v + (1 - options.beta2) * g * g
    c1, c2 = 1 - options.beta1**options.step, 1 - options.beta2**options.step
    p = p * (1 - options.lr * options.weight_decay)
    return p - options.lr * (m / c1) / (v.sqrt() / sqrt(c2) + options.eps), m, v


def by_bitsandbytes(made):
    for tensor in made:
        bnb.functional.optimizer_update_8bit_blockwise(
            *("adam", tensor.gradient, tensor.parameter, tensor.m_codes, tensor.v_codes),
            *(OPTIONS.beta1, OPTIONS.beta2, 0.0, 0.0, OPTIONS.eps, OPTIONS.step, OPTIONS.lr),
            *(M_TABLE, V_TABLE, tensor.m_absmax, tensor.v_absmax, OPTIONS.weight_decay),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("offset", [0, 3])
def test_a_step_is_no_further_from_the_truth_than_bitsandbytes(name, dtype, offset):
    before = tensors(dtype, offset=offset)
    ours, theirs = copied(before), copied(before)
    if offset:  # an address that is no multiple of 16 bytes
        ours = [replace(one, parameter=shifted(one.parameter)) for one in ours]
    op(name).update_(ours, M_TABLE, V_TABLE, OPTIONS)
    by_bitsandbytes(theirs)
    for old, mine, their in zip(before, ours, theirs, strict=True):
        truth = dict(zip(("p", "m", "v"), exact(old), strict=True))
        found = [
            dict(zip(("p", "m", "v"), (t.parameter.flatten(), *moments(t)), strict=True))
            for t in (mine, their)
        ]
        assert_no_worse_than(
            *found, truth, slack=0.02, floor=1e-6 if dtype == torch.float32 else None
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_writes_the_codes_of_the_reference(dtype):
    made = tensors(dtype)
    one, other = copied(made), copied(made)
    op("triton").update_(one, M_TABLE, V_TABLE, OPTIONS)
    op("reference").update_(other, M_TABLE, V_TABLE, OPTIONS)
    for mine, known in zip(one, other, strict=True):
        for name in ("m_codes", "v_codes"):
            differ = getattr(mine, name).int() - getattr(known, name).int()
            assert differ.abs().max() <= 1 and differ.ne(0).float().mean() < 0.002
        torch.testing.assert_close(mine.m_absmax, known.m_absmax, rtol=1e-6, atol=0)
        torch.testing.assert_close(mine.v_absmax, known.v_absmax, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_the_same_bits_twice_and_nothing_beside_the_tensors(name):
    made = tensors()
    one, other = copied(made), copied(made)
    for run in (one, other):
        op(name).update_(run, M_TABLE, V_TABLE, OPTIONS)
    for first, second in zip(one, other, strict=True):
        for field in fields(first):
            assert torch.equal(getattr(first, field.name), getattr(second, field.name))
    wide = torch.full((600,), 7.0, device=DEVICE)
    inside = replace(made[1], parameter=wide[16 : 16 + 255])
    op(name).update_([inside], M_TABLE, V_TABLE, OPTIONS)
    assert wide[:16].eq(7).all() and wide[16 + 255 :].eq(7).all()
    assert wide[16 : 16 + 255].ne(7).all()


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_a_gradient_that_is_not_finite_leaves_its_element_and_clears_its_moments(name):
    (made,) = tensors(sizes=[(512,)])
    made.gradient[3], made.gradient[5], made.gradient[300] = float("nan"), float("inf"), -1.0
    kept = made.parameter[[3, 5]].clone()
    op(name).update_([made], M_TABLE, V_TABLE, OPTIONS)
    assert torch.equal(made.parameter[[3, 5]], kept) and made.parameter.isfinite().all()
    m, v = moments(made)
    assert not m[[3, 5]].any() and not v[[3, 5]].any() and m[300] != 0


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_a_block_of_zeros_stays_one_and_a_small_negative_moment_keeps_its_sign(name):
    (made,) = tensors(sizes=[(512,)])
    for state in (made.m_codes, made.v_codes, made.gradient):
        state.zero_()
    made.m_absmax.zero_(), made.v_absmax.zero_()
    made.gradient[256], made.gradient[257], made.gradient[258] = 1.0, -1e-9, 1e-9
    kept = made.parameter.clone()
    op(name).update_([made], M_TABLE, V_TABLE, replace(OPTIONS, weight_decay=0.0))
    assert torch.equal(made.parameter[:256], kept[:256])
    assert not made.m_absmax[0] and not made.v_absmax[0]
    m, _ = moments(made)
    assert m[257] < 0 and m[258] == 0


@pytest.mark.gpu
def test_all_tensors_of_a_lora_take_one_launch():
    made = tensors(sizes=[(16, 4096)] * 200)
    op("triton").update_(copied(made), M_TABLE, V_TABLE, OPTIONS)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        op("triton").update_(made, M_TABLE, V_TABLE, OPTIONS)
        torch.cuda.synchronize()
    on_card = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert [e.name for e in on_card if not e.name.startswith("Mem")] == ["_update"]
