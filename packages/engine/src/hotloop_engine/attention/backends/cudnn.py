"""cuDNN's fused attention for dense batches: the fastest forward on Hopper at common lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hotloop_engine.attention.interface import HALF, Backend, Capability, Gradients, Inputs, aligned

if TYPE_CHECKING:
    from hotloop_engine.attention.sequences import Sequences

_aten = torch.ops.aten


class Cudnn(Backend):
    """Sequences of one length. cuDNN builds a plan for each shape of batch, 0.09 s on an H200.

    Not on Ampere, where PyTorch's own flash kernel is the faster. PyTorch gives its backward no
    deterministic switch. Its plans are found by the strides of q, k and v alone, so o and do are
    always passed contiguous: other strides would meet a plan made for these.
    """

    name = "cudnn"
    capability = Capability(
        devices=frozenset({"cuda"}),
        dtypes=HALF,
        head_sizes=(8, 128, 8),
        compute_capability=((9, 0), (10, 9)),
        packed=False,
        window=False,
        softcap=False,
        deterministic=False,
        plans=True,
    )

    def _forward(self, inputs: Inputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        o_BHSK, lse_BHS, *_ = _aten._scaled_dot_product_cudnn_attention(
            *(_dense(aligned(x), inputs.sequences) for x in inputs.qkv),
            None,
            True,
            0.0,
            True,
            False,
            scale=inputs.scale,
        )
        return _flat(o_BHSK), lse_BHS

    def _backward(
        self, inputs: Inputs, do_THK: Tensor, o_THK: Tensor, lse: Tensor, out: Gradients | None
    ) -> Gradients:
        no_seed = torch.zeros(1, dtype=torch.int64, device=inputs.q_THK.device)
        found = _aten._scaled_dot_product_cudnn_attention_backward(
            _dense(do_THK.contiguous(), inputs.sequences),
            *(_dense(aligned(x), inputs.sequences) for x in inputs.qkv),
            _dense(o_THK.contiguous(), inputs.sequences),
            lse,
            no_seed,
            no_seed,
            None,  # bias
            None,  # offsets of a packed batch
            None,
            inputs.sequences.longest,
            inputs.sequences.longest,
            0.0,
            True,
            scale=inputs.scale,
        )
        dq, dk, dv = (_flat(x) for x in found)
        return dq, dk, dv


def _dense(x_THK: Tensor, sequences: Sequences) -> Tensor:
    shape = sequences.dense_shape
    assert shape is not None  # the request said so
    return x_THK.unflatten(0, shape).transpose(1, 2)


def _flat(x_BHSK: Tensor) -> Tensor:
    return x_BHSK.transpose(1, 2).flatten(0, 1)
