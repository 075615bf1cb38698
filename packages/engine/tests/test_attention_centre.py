"""A bias on v, taken out before attention and added behind it."""

from __future__ import annotations

import pytest
import torch
from hotloop_engine.attention import Sequences, add_centre, request
from hotloop_engine.attention.backends import BACKENDS
from hotloop_testkit.numerics import assert_no_worse_than, poisoned_buffers, relative_error
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H, G, K = 4, 2, 64
LENGTHS = (40, 17, 64, 1, 5)  # five rows, as test_packed_attention.py has: compiled once
SCALE = K**-0.5


def inputs(dtype: torch.dtype, bias: float) -> tuple[list[Tensor], Tensor]:
    """q, k, v (columns of one buffer; k and v with biases, as Qwen 2 has them), do; and v's bias."""
    tokens = sum(LENGTHS)
    wide = torch.randn(tokens, (H + 2 * G) * K, device=DEVICE).to(dtype)
    q, k, v = (p.unflatten(1, (-1, K)) for p in wide.split([H * K, G * K, G * K], dim=1))
    centre_GK = (torch.randn(G, K, device=DEVICE) * bias).to(dtype)
    k += (torch.randn(G, K, device=DEVICE) * 2).to(dtype)
    v += centre_GK
    return [q, k, v, torch.randn(tokens, H, K, device=DEVICE).to(dtype)], centre_GK


def eager(tensors: list[Tensor]) -> dict[str, Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[:3])
    outputs = []
    for qs, ks, vs in zip(
        *(x.transpose(0, 1).split(LENGTHS, dim=1) for x in (q, k, v)), strict=True
    ):
        ks, vs = (x.repeat_interleave(H // G, 0) for x in (ks, vs))
        scores = qs @ ks.mT * SCALE
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
        wide = torch.promote_types(q.dtype, torch.float32)
        outputs.append((scores.softmax(-1, dtype=wide).to(q.dtype) @ vs).transpose(0, 1))
    o = torch.cat(outputs)
    return {
        "o": o.detach(),
        **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, (q, k, v), tensors[3]), strict=True)),
    }


def run(backend, tensors: list[Tensor], centre_GK: Tensor | None) -> dict[str, Tensor]:
    q, k, v, do = tensors
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], device=DEVICE)
    sequences = Sequences.from_cu_seqlens(offsets, tokens=sum(LENGTHS))
    if reason := backend.refusal(request(q, k, sequences), DEVICE):
        where = "needs a CUDA device: " if DEVICE.type == "cpu" else ""
        pytest.skip(f"{where}{backend.name}: {reason}")
    if centre_GK is not None:
        v.sub_(centre_GK)
    o, lse = backend.forward(q, k, v, sequences, scale=SCALE)
    dq, dk, dv = backend.backward(do, q, k, v, o, lse, sequences, scale=SCALE)
    if centre_GK is not None:
        o = add_centre(o, centre_GK)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [0.5, 3.0, 30.0])
def test_with_the_bias_taken_out_gradients_are_no_worse_than_eager(backend, dtype, bias) -> None:
    tensors, centre_GK = inputs(dtype, bias)
    truth, theirs = eager([x.double() for x in tensors]), eager(tensors)
    with poisoned_buffers():
        ours = run(backend, tensors, centre_GK)
    assert_no_worse_than(ours, theirs, truth)


def test_a_large_bias_left_in_costs_dq_ten_times_what_it_costs_taken_out() -> None:
    """The reason for centring: the day that this fails, the backend has an exact delta and needs none."""
    backend = next(
        b for b in BACKENDS if b.name == ("flash" if DEVICE.type == "cuda" else "sdpa_cpu")
    )
    tensors, centre_GK = inputs(torch.bfloat16, 30.0)
    truth = eager([x.double() for x in tensors])["dq"]
    left_in = relative_error(run(backend, tensors, None)["dq"], truth)
    taken_out = relative_error(run(backend, tensors, centre_GK)["dq"], truth)
    assert left_in > 10 * taken_out


def test_the_centre_is_added_to_each_head_of_its_group_once_and_rounded_once() -> None:
    o_THK = torch.randn(5, H, K, dtype=torch.float64)
    centre_GK = torch.randn(G, K, dtype=torch.float64)
    expected = o_THK + centre_GK.repeat_interleave(H // G, 0)
    assert torch.equal(add_centre(o_THK, centre_GK), expected)
    buffer = torch.full((5, H * K + 8), float("nan"), dtype=torch.float64)
    view = buffer[:, : H * K].unflatten(1, (H, K))
    assert add_centre(o_THK, centre_GK, out=view) is view
    assert torch.equal(view, expected)
    assert buffer[:, H * K :].isnan().all()
    assert torch.equal(add_centre(o_THK, centre_GK, out=o_THK), expected)
    half = add_centre(o_THK.bfloat16(), centre_GK.bfloat16())
    exact = o_THK.bfloat16().double() + centre_GK.bfloat16().double().repeat_interleave(H // G, 0)
    assert torch.equal(half, exact.bfloat16())
