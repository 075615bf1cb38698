"""FlashAttention 4 (the optional package flash-attn-4), compiled on first use; about 16 s then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hotloop_engine.attention.interface import (
    HALF,
    Backend,
    Capability,
    Gradients,
    Options,
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

    def _forward(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        sequences: Sequences,
        options: Options,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import (  # pyright: ignore[reportMissingImports]
            _flash_attn_fwd,
        )

        o_THK, lse_HT, *_ = _flash_attn_fwd(
            *(aligned(x) for x in (q_THK, k_TGK, v_TGK)),
            **_layout(sequences),
            softmax_scale=options.scale,
            softcap=options.softcap,
            **_visible(options),
            return_lse=True,
            out=out if out is not None and is_aligned(out) else None,
        )
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
        from flash_attn.cute.interface import (  # pyright: ignore[reportMissingImports]
            _flash_attn_bwd,
        )

        targets = [x if is_aligned(x) else None for x in out] if out else [None] * 3
        dq_THK, dk_TGK, dv_TGK = _flash_attn_bwd(
            *(aligned(x) for x in (q_THK, k_TGK, v_TGK, o_THK, do_THK)),
            lse,
            **_layout(sequences),
            softmax_scale=options.scale,
            softcap=options.softcap or 0.0,
            **_visible(options),
            deterministic=options.deterministic,
            dq=targets[0],
            dk=targets[1],
            dv=targets[2],
        )
        return dq_THK, dk_TGK, dv_TGK


def _layout(sequences: Sequences) -> dict[str, Tensor | int]:
    return {
        "cu_seqlens_q": sequences.cu_seqlens,
        "cu_seqlens_k": sequences.cu_seqlens,
        "max_seqlen_q": sequences.longest,
        "max_seqlen_k": sequences.longest,
    }


def _visible(options: Options) -> dict[str, int | bool | None]:
    if options.window is None:
        return {"causal": True, "window_size_left": None, "window_size_right": None}
    # Their window counts the tokens before this one, ours includes it.
    return {"causal": False, "window_size_left": options.window - 1, "window_size_right": 0}
