"""Our own kernels: every option at once, in any float dtype, on any card that Triton reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hotloop_engine.attention.interface import (
    Backend,
    Capability,
    Gradients,
    Options,
    Request,
    unit_stride,
)

if TYPE_CHECKING:
    from hotloop_engine.attention.sequences import Sequences


class Triton(Backend):
    """Packed and dense, window, soft cap, grouped queries, any strides; nothing is atomic."""

    name = "triton"
    capability = Capability(
        devices=frozenset({"cuda", "cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        head_sizes=(16, 256, 1),
        forced_on=frozenset({"cpu"}),
        compute_capability=((8, 0), (99, 9)),
        packages=("triton",),
    )

    def missing(self, device: torch.device) -> str | None:
        """As every backend; on the CPU only Triton's interpreter can run it, for tests."""
        if reason := super().missing(device):
            return reason
        if device.type == "cpu":
            from hotloop_engine.attention.kernel import INTERPRETED

            return None if INTERPRETED else "runs on cuda (on cpu only in Triton's interpreter)"
        return None

    def refusal(self, request: Request, device: torch.device) -> str | None:
        """As every backend, and what the interpreter computes wrongly."""
        if reason := super().refusal(request, device):
            return reason
        if device.type == "cpu" and request.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return None

    def _forward(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        sequences: Sequences,
        options: Options,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        from hotloop_engine.attention.kernel import attention_forward

        o_THK = q_THK.new_empty(q_THK.shape) if out is None else out
        q_THK, k_TGK, v_TGK = (unit_stride(x) for x in (q_THK, k_TGK, v_TGK))
        lse_HT = attention_forward(q_THK, k_TGK, v_TGK, o_THK, sequences, options)
        return o_THK, lse_HT

    def _backward(
        self,
        do_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        o_THK: Tensor,
        lse: Tensor,
        sequences: Sequences,
        options: Options,
        out: Gradients | None,
    ) -> Gradients:
        from hotloop_engine.attention.kernel import attention_backward

        dq, dk, dv = out or (x.new_empty(x.shape) for x in (q_THK, k_TGK, v_TGK))
        do_THK, q_THK, k_TGK, v_TGK, o_THK = (
            unit_stride(x) for x in (do_THK, q_THK, k_TGK, v_TGK, o_THK)
        )
        attention_backward(do_THK, q_THK, k_TGK, v_TGK, o_THK, lse, dq, dk, dv, sequences, options)
        return dq, dk, dv
