from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hotloop_safetensors import nf4

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    functional = pytest.importorskip("bitsandbytes.functional")


def scales(absmax: torch.Tensor, state: Any) -> torch.Tensor:
    nested = state.state2.absmax.repeat_interleave(256)[: len(absmax)]
    return state.state2.code[absmax.long()] * nested + state.offset


@pytest.mark.parametrize("shape", [(64, 64), (256, 96), (7, 66), (1, 1)])
def test_every_tensor_is_what_bitsandbytes_makes(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * 0.02
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    expected = state.as_dict(packed=True)
    made = dict(zip(nf4.SUFFIXES, nf4.encode(weight, "float32"), strict=True))
    assert torch.equal(made[""], packed)
    # The map of the scales stands in the file; theirs is made in float32 and differs in its last bit.
    torch.testing.assert_close(
        made[".nested_quant_map"], expected["nested_quant_map"], rtol=1e-6, atol=0.0
    )
    for end in (".quant_map", ".nested_absmax"):
        assert torch.equal(made[end], expected[end.removeprefix(".")]), end
    # bitsandbytes takes a neighbour of the nearest code for some scales; ours is the nearest.
    blocks = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % 64)).reshape(-1, 64)
    truth = blocks.abs().amax(1)
    errors = [
        (scales(absmax, state) - truth).abs().max() for absmax in (made[".absmax"], state.absmax)
    ]
    assert errors[0] <= errors[1]
    described = functional.unpack_tensor_to_dict(made[nf4.SUFFIXES[-1]])
    theirs = functional.unpack_tensor_to_dict(expected["quant_state.bitsandbytes__nf4"])
    offsets = [d.pop("nested_offset") for d in (described, theirs)]
    assert described == theirs and offsets[0] == pytest.approx(offsets[1], rel=1e-6)


def test_a_weight_of_zeros_stays_zero() -> None:
    made = nf4.encode(torch.zeros(64, 64), "bfloat16")
    assert made[4].unique().tolist() == [0x77]


@pytest.mark.parametrize("shape", [(64, 64), (5, 13), (4096, 3)])
def test_the_announced_shapes_are_those_that_are_made(shape: tuple[int, int]) -> None:
    made = nf4.encode(torch.randn(shape), "bfloat16")
    announced = nf4.shapes(shape)
    assert [(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in made] == announced
    assert sum(t.numel() * t.element_size() for t in made) % 4 == 0
