"""PyTorch's flash kernel for CPUs: dense batches at once, packed ones sequence by sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hotloop_engine.attention.interface import Backend, Capability, Gradients, Inputs, unit_stride

if TYPE_CHECKING:
    from hotloop_engine.attention.sequences import Sequences

_aten = torch.ops.aten


class SdpaCpu(Backend):
    """Any dtype and head size, in one thread order that depends on nothing but the shapes."""

    name = "sdpa_cpu"
    capability = Capability(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16}),
        head_sizes=(1, 1024, 1),
        window=False,
        softcap=False,
    )

    def _forward(self, inputs: Inputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        q_THK = inputs.q_THK
        o_THK = q_THK.new_empty(q_THK.shape) if out is None else out
        wide = torch.float64 if q_THK.dtype == torch.float64 else torch.float32
        lse_TH = q_THK.new_empty(q_THK.shape[:2], dtype=wide)
        for rows, shape in _batches(inputs.sequences):
            q, k, v = (_heads_first(unit_stride(x[rows]), shape) for x in inputs.qkv)
            o_BHSK, lse_BHS = _aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, True, scale=inputs.scale
            )
            o_THK[rows] = o_BHSK.transpose(1, 2).flatten(0, 1)
            lse_TH[rows] = lse_BHS.transpose(1, 2).flatten(0, 1)
        return o_THK, lse_TH

    def _backward(
        self, inputs: Inputs, do_THK: Tensor, o_THK: Tensor, lse: Tensor, out: Gradients | None
    ) -> Gradients:
        targets = out or tuple(x.new_empty(x.shape) for x in inputs.qkv)
        for rows, shape in _batches(inputs.sequences):
            do, q, k, v, o = (
                _heads_first(unit_stride(x[rows]), shape) for x in (do_THK, *inputs.qkv, o_THK)
            )
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, o, _heads_first(lse[rows], shape), 0.0, True, scale=inputs.scale
            )
            for target, dx_BHSK in zip(targets, found, strict=True):
                target[rows] = dx_BHSK.transpose(1, 2).flatten(0, 1)
        dq, dk, dv = targets
        return dq, dk, dv


def _batches(sequences: Sequences) -> list[tuple[slice, tuple[int, int]]]:
    """What one call of the kernel can take: token rows and their [batch, length]."""
    if sequences.dense_shape is not None:
        return [(slice(0, sequences.tokens), sequences.dense_shape)]
    return [(slice(start, stop), (1, stop - start)) for start, stop in sequences.bounds()]


def _heads_first(x: Tensor, shape: tuple[int, int]) -> Tensor:
    return x.unflatten(0, shape).transpose(1, 2)
