"""PyTorch's memory-efficient kernel: fp16 on cards before Ampere (Turing, Volta)."""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop_engine.attention.interface import Backend, Capability, Gradients, Inputs, aligned

_aten = torch.ops.aten
_CAUSAL = 1  # its number for a mask aligned at the top left of each sequence


class Efficient(Backend):
    """Packed and dense alike, without window or soft cap. Repeats k and v for grouped queries.

    Its backward adds into dq from several blocks at once unless it runs one block per head, which
    `num_splits_key=1` asks for; that is the deterministic switch.
    """

    name = "efficient"
    capability = Capability(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        head_sizes=(8, 256, 8),
        compute_capability=((7, 0), (12, 1)),
        window=False,
        softcap=False,
    )

    def _forward(self, inputs: Inputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        o_1THK, lse_BHS, *_ = _aten._efficient_attention_forward(
            *_repeated(*inputs.qkv),
            None,
            inputs.sequences.cu_seqlens,
            inputs.sequences.cu_seqlens,
            inputs.sequences.longest,
            inputs.sequences.longest,
            0.0,
            _CAUSAL,
            True,
            scale=inputs.scale,
        )
        return o_1THK[0], lse_BHS

    def _backward(
        self, inputs: Inputs, do_THK: Tensor, o_THK: Tensor, lse: Tensor, out: Gradients | None
    ) -> Gradients:
        unused = torch.zeros((), dtype=torch.int64, device=inputs.q_THK.device)
        dq, dk, dv, _ = _aten._efficient_attention_backward(
            do_THK.contiguous()[None],
            *_repeated(*inputs.qkv),
            None,
            o_THK.contiguous()[None],
            inputs.sequences.cu_seqlens,
            inputs.sequences.cu_seqlens,
            inputs.sequences.longest,
            inputs.sequences.longest,
            lse,
            0.0,
            unused,
            unused,
            _CAUSAL,
            False,
            scale=inputs.scale,
            num_splits_key=1 if inputs.deterministic else None,
        )
        return dq[0], _summed(dk[0], inputs.k_TGK), _summed(dv[0], inputs.v_TGK)


def _repeated(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    repeat = q_THK.shape[1] // k_TGK.shape[1]
    if repeat == 1:
        return aligned(q_THK)[None], aligned(k_TGK)[None], aligned(v_TGK)[None]
    k_THK, v_THK = (x.repeat_interleave(repeat, dim=1) for x in (k_TGK, v_TGK))
    return aligned(q_THK)[None], k_THK[None], v_THK[None]


def _summed(dx_THK: Tensor, x_TGK: Tensor) -> Tensor:
    """The gradient of a head that several queries shared: summed in fp32, rounded once more."""
    if dx_THK.shape == x_TGK.shape:
        return dx_THK
    return dx_THK.unflatten(1, (x_TGK.shape[1], -1)).sum(2, dtype=torch.float32).to(x_TGK.dtype)
