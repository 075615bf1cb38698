"""Dequantisation of bitsandbytes' 4-bit weights (NF4 and FP4) into a caller's buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import CheckpointError, UnsupportedError
from hotloop_core.kernels import FourBitWeight

from hotloop_engine.ops._select import implementation

if TYPE_CHECKING:
    from torch import Tensor

OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dequantize_4bit(
    weight: FourBitWeight, *, out: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """W[n, k] = code[packed] * absmax[block]   arXiv:2305.14314 section 3; see `Dequantize4bit`.

    Args:
        weight: the packed weight of shape (N, K).
        out: (N, K), bf16, fp16 or fp32, columns of stride 1 and rows of any: a corner of a wider
            buffer, so that several projections lie side by side. None allocates `weight.dtype`.
        impl: "triton", "reference" or a plugin's; None lets the device decide.

    Returns:
        `out`. It carries no gradient: a 4-bit weight is frozen.

    Raises:
        UnsupportedError: `out` has another shape, device, dtype or column stride.

    """
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.packed.device)
    elif (
        tuple(out.shape) != weight.shape
        or out.device != weight.packed.device
        or out.dtype not in OUTPUT_DTYPES
        or (out.shape[1] > 1 and out.stride(1) != 1)
    ):
        raise UnsupportedError(
            f"cannot dequantise a {weight.shape} weight on {weight.packed.device} into a "
            f"{tuple(out.shape)} {out.dtype} buffer on {out.device} with strides {out.stride()}; "
            "pass one of the weight's shape and device in bf16, fp16 or fp32 whose columns have "
            "stride 1."
        )
    with torch.no_grad():
        return implementation("nf4", weight.packed.device, impl).forward(weight, out=out)


def from_bitsandbytes(weight: Tensor) -> FourBitWeight:
    """A view of bitsandbytes' `Params4bit` (packed data and `quant_state`); copies nothing.

    It holds the tensors of this moment: take it anew where a weight may have moved since.

    Raises:
        UnsupportedError: the weight is not quantised yet, or not to NF4 or FP4, or has another
            number of dimensions than two.
        CheckpointError: the packed data is of another size than the shape says.

    """
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "quant_type", None) not in ("nf4", "fp4"):
        raise UnsupportedError(
            f"expected a weight that bitsandbytes has quantised to nf4 or fp4, found "
            f"{type(weight).__name__} with quant_state {type(state).__name__}; Params4bit "
            "quantises when it is moved to its device, so move the layer there first."
        )
    if len(state.shape) != 2:
        raise UnsupportedError(
            f"expected a 4-bit weight of shape (N, K), found {tuple(state.shape)}; quantise the "
            "projections of a layer one by one."
        )
    rows, columns = state.shape
    packed = weight.data.reshape(-1).view(torch.uint8)
    if packed.numel() != -(-rows * columns // 2):
        raise CheckpointError(
            f"a 4-bit weight of shape {(rows, columns)} has {-(-rows * columns // 2)} packed "
            f"bytes, found {packed.numel()}; a shard, or a damaged file? Gather or reload it."
        )
    outer = state.state2 if state.nested else None
    return FourBitWeight(
        packed=packed,
        absmax=state.absmax if outer else state.absmax.float(),
        code=state.code,
        blocksize=state.blocksize,
        shape=(rows, columns),
        dtype=state.dtype,
        kind=state.quant_type,
        nested_absmax=outer.absmax if outer else None,
        nested_code=outer.code if outer else None,
        nested_offset=state.offset if outer else None,
        nested_blocksize=outer.blocksize if outer else 256,
    )
