"""FlashAttention 4 (the optional package flash-attn-4), compiled on first use; about 16 s then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hotloop_engine.attention.interface import (
    HALF,
    Backend,
    Capability,
    Gradients,
    Inputs,
    Request,
    aligned,
    is_aligned,
)

if TYPE_CHECKING:
    from hotloop_engine.attention.sequences import Sequences

_HOPPER = (9, 0)


class FlashAttention4(Backend):
    """Packed and dense alike; window, soft cap and, by semaphores, a deterministic backward.

    Calls the functions beneath the package's autograd (4.0.0b36): they take the output buffers.
    """

    name = "fa4"
    capability = Capability(
        devices=frozenset({"cuda"}),
        dtypes=HALF,
        head_sizes=(8, 256, 8),
        compute_capability=(_HOPPER, (11, 9)),
        packages=("flash_attn.cute",),
    )

    def refusal(self, request: Request, device: torch.device) -> str | None:
        """As every backend, and what the kernels for Blackwell lack."""
        if reason := super().refusal(request, device):
            return reason
        if torch.cuda.get_device_capability(device) > _HOPPER and request.head_size > 128:
            return f"head sizes to 128 on this card, not {request.head_size}"
        return None

    def _forward(self, inputs: Inputs, out: Tensor | None) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import (  # pyright: ignore[reportMissingImports]
            _flash_attn_fwd,
        )

        q_THK, k_TGK, v_TGK = (aligned(x) for x in inputs.qkv)
        o_THK, lse_HT, *_ = _flash_attn_fwd(
            q_THK,
            k_TGK,
            v_TGK,
            **_layout(inputs.sequences),
            softmax_scale=inputs.scale,
            softcap=inputs.softcap,
            **_visible(inputs),
            return_lse=True,
            out=out if out is not None and is_aligned(out) else None,
        )
        return o_THK, lse_HT

    def _backward(
        self, inputs: Inputs, do_THK: Tensor, o_THK: Tensor, lse: Tensor, out: Gradients | None
    ) -> Gradients:
        from flash_attn.cute.interface import (  # pyright: ignore[reportMissingImports]
            _flash_attn_bwd,
        )

        targets = [x if is_aligned(x) else None for x in out] if out else [None] * 3
        q_THK, k_TGK, v_TGK = (aligned(x) for x in inputs.qkv)
        dq_THK, dk_TGK, dv_TGK = _flash_attn_bwd(
            q_THK,
            k_TGK,
            v_TGK,
            aligned(o_THK),
            aligned(do_THK),
            lse,
            **_layout(inputs.sequences),
            softmax_scale=inputs.scale,
            softcap=inputs.softcap or 0.0,
            **_visible(inputs),
            deterministic=inputs.deterministic,
            dq=targets[0],
            dk=targets[1],
            dv=targets[2],
        )
        return dq_THK, dk_TGK, dv_TGK


def _layout(sequences: Sequences) -> dict[str, Any]:
    return {
        "cu_seqlens_q": sequences.cu_seqlens,
        "cu_seqlens_k": sequences.cu_seqlens,
        "max_seqlen_q": sequences.longest,
        "max_seqlen_k": sequences.longest,
    }


def _visible(inputs: Inputs) -> dict[str, Any]:
    if inputs.window is None:
        return {"causal": True, "window_size_left": None, "window_size_right": None}
    # Their window counts the tokens before this one, ours includes it.
    return {"causal": False, "window_size_left": inputs.window - 1, "window_size_right": 0}
