"""Packed rows against the same rows alone, in every attention backend that is there."""

from __future__ import annotations

from itertools import accumulate, pairwise, product
from typing import TYPE_CHECKING

import pytest
import torch
from hotloop_engine.attention import Backend, Request, Sequences, request
from hotloop_engine.attention.backends import BACKENDS
from hotloop_testkit.numerics import assert_no_worse_than, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FP32, BF16 = torch.float32, torch.bfloat16
BY_NAME = {backend.name: backend for backend in BACKENDS}
LENGTHS = [(1, 2, 63, 64, 1), (3, 130, 1, 1, 2), (1,) * 7 + (7,), (2, 1, 2, 1, 1)]
"""130: more than two of the kernels' blocks. Five to eight rows each, so that our kernel compiles once for all."""


def meetings(dtype: torch.dtype, *windows: int | None) -> list:
    """(name, dtype, window) of every backend whose capability admits them; what needs a GPU is marked so."""
    found = []
    for backend, window in product(BACKENDS, windows):
        asked = Request(dtype=dtype, heads=4, kv_heads=2, head_size=64, packed=True, window=window)
        if backend.capability.refusal(asked) is None:
            here = "cpu" in backend.capability.devices
            if backend.name == "triton":  # Triton's interpreter multiplies bfloat16 wrongly
                here = dtype == FP32
            marks = () if here else pytest.mark.gpu
            name = backend.name if window is None else f"{backend.name}-window{window}"
            found.append(pytest.param(backend.name, dtype, window, marks=marks, id=name))
    return found


def device_of(name: str) -> torch.device:
    return torch.device(
        "cuda"
        if torch.cuda.is_available() and "cuda" in BY_NAME[name].capability.devices
        else "cpu"
    )


def tensors(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, do: 4 heads over 2, of 64."""
    generator = torch.Generator().manual_seed(5)
    tokens = sum(lengths)
    shapes = [(tokens, heads, 64) for heads in (4, 2, 2, 4)]
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def run(
    backend: Backend, inputs: list[Tensor], sequences: Sequences, window: int | None
) -> dict[str, Tensor]:
    q, k, v, do = inputs
    asked = request(q, k, sequences, window=window)
    if reason := backend.refusal(asked, q.device):
        pytest.skip(f"needs a CUDA device with {backend.name}: {reason}")
    options = {"scale": 0.125, "window": window}
    o, lse = backend.forward(q, k, v, sequences, **options)
    dq, dk, dv = backend.backward(do, q, k, v, o, lse, sequences, **options)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def packed(name: str, inputs: list[Tensor], lengths: Sequence[int], window=None):
    offsets = torch.tensor([0, *accumulate(lengths)], device=inputs[0].device)
    sequences = Sequences.from_cu_seqlens(offsets, tokens=sum(lengths))
    return run(BY_NAME[name], inputs, sequences, window)


def alone(inputs: list[Tensor], lengths: Sequence[int], window=None) -> dict[str, Tensor]:
    """Row after row through the reference, a softmax over all scores as eager has it."""
    parts = [
        run(
            BY_NAME["reference"],
            [x[start:stop] for x in inputs],
            Sequences.dense(1, stop - start, inputs[0].device),
            window,
        )
        for start, stop in pairwise([0, *accumulate(lengths)])
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: "-".join(map(str, x)))
@pytest.mark.parametrize(("name", "dtype", "window"), meetings(FP32, None, 5))
def test_in_fp32_packed_rows_are_rows_alone(name, dtype, window, lengths):
    inputs = tensors(lengths, device_of(name), dtype)
    truth = alone([x.double() for x in inputs], lengths, window)
    for key, value in packed(name, inputs, lengths, window).items():
        assert relative_error(value, truth[key]) <= 1e-5, key


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: "-".join(map(str, x)))
@pytest.mark.parametrize(("name", "dtype", "window"), meetings(BF16, None, 5))
def test_in_bf16_packed_rows_are_no_worse_than_eager_alone(name, dtype, window, lengths):
    inputs = tensors(lengths, device_of(name), dtype)
    truth = alone([x.double() for x in inputs], lengths, window)
    found = packed(name, inputs, lengths, window)
    # Rows of one or two tokens alone: do . o is taken from o as stored, which costs more than it does over many tokens.
    floor = 1.6e-2 if max(lengths) <= 7 else None
    assert_no_worse_than(found, alone(inputs, lengths, window), truth, floor=floor)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12))
@pytest.mark.parametrize("name", ["reference", "sdpa_cpu"])
def test_any_lengths_give_rows_alone(name, lengths):
    inputs = tensors([*lengths, 3], torch.device("cpu"), torch.float32)
    truth = alone([x.double() for x in inputs], [*lengths, 3])
    for key, value in packed(name, inputs, [*lengths, 3]).items():
        assert relative_error(value, truth[key]) <= 1e-5, key


@pytest.mark.parametrize(
    ("name", "dtype", "window"), [*meetings(FP32, None), *meetings(BF16, None)]
)
def test_changing_one_row_of_many_short_ones_changes_no_bit_of_another(name, dtype, window):
    lengths = (1, 1, 5, 1, 2, 30, 1, 1)
    device = device_of(name)
    inputs = tensors(lengths, device, dtype)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[2:7] *= -3
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[2:7] = False
    before, after = (packed(name, x, lengths, window) for x in (inputs, changed))
    for key, value in before.items():
        if device.type == "cpu" or key == "o":  # on CUDA, test_attention_gpu.py compares gradients
            assert torch.equal(value[others], after[key][others]), key
