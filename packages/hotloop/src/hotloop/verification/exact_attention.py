"""softmax(q k^T / sqrt(K) + mask) v as written, in the dtype of q: transformers' own take the softmax in fp32.

Registered as an attention implementation of transformers, since each model calls the one that its config names.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import UnsupportedError
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "hotloop_exact"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: q [B, H, S, K], k and v [B, G, S, K], a bool mask or None for causal.

    Returns [B, S, H, K]. A token that may see nothing (padding) gets zeros.

    Raises:
        UnsupportedError: attention sinks, which would change the softmax.
    """
    if others.get("s_aux") is not None:
        raise UnsupportedError(
            "truth has no attention sinks (s_aux); this model cannot be verified"
        )
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = scale * query @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    visible = attention_mask.any(dim=-1, keepdim=True)
    # A row of -inf alone would give NaN, also as a gradient, so such rows see everything and are then dropped.
    shares = scores.masked_fill(~attention_mask & visible, -inf).softmax(dim=-1)
    return ((shares * visible) @ value).transpose(1, 2).contiguous(), None


def register() -> str:
    """Makes the implementation known to transformers; returns its name."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME
