"""Our own kernels: every option at once, in any float dtype, on any card that Triton reaches."""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop_engine.attention.interface import Backend, Capability, Gradients, Inputs, Request


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

    def _forward(self, inputs: Inputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        from hotloop_engine.attention.kernel import attention_forward

        o_THK = inputs.q_THK.new_empty(inputs.q_THK.shape) if out is None else out
        return o_THK, attention_forward(inputs, o_THK)

    def _backward(
        self, inputs: Inputs, do_THK: Tensor, o_THK: Tensor, lse: Tensor, out: Gradients | None
    ) -> Gradients:
        from hotloop_engine.attention.kernel import attention_backward

        dq, dk, dv = out or (x.new_empty(x.shape) for x in inputs.qkv)
        attention_backward(inputs, do_THK, o_THK, lse, (dq, dk, dv))
        return dq, dk, dv
