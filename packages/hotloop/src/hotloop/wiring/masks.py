"""The attention name that keeps transformers from building a T x T mask before any layer runs.

Wiring sets `config._attn_implementation` of one model to "hotloop_" + the name it had. Its mask function returns a lazy
mask: wired layers read the 2-D padding mask it carries; the model's own attention (generation, a KV cache) gets exactly
what the original implementation would have got.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .lazy import LazyTensor

PREFIX = "hotloop_"


class LazyMask(LazyTensor):
    """The mask [B, 1, Q, KV] that the original attention would get: added to the scores (eager), or true where a
    query sees a key (the others). `original()` may also be None or a BlockMask.

    padding: the 2-D mask [B, KV] (bool) that came with the batch, or None. custom: whether somebody combined the causal
    mask with a function of their own, so that the layers must not take it for causal.
    """

    padding: Tensor | None
    custom: bool
    _original: Any

    def contiguous(self, **_: Any) -> LazyMask:  # type: ignore[override]
        """Itself: generation asks for this before any layer has seen the mask."""
        return self

    def original(self) -> Any:
        """What the original implementation's mask function returns, made at the first call."""
        if callable(self._original):
            self._original = self._original()
        return self._original


def register(original: str) -> str:
    """Registers the attention and mask functions for a model whose implementation is `original`; returns their name."""
    name = PREFIX + original
    AttentionInterface.register(name, partial(_attention, original))
    AttentionMaskInterface.register(name, partial(_mask, original))
    return name


def _mask(original: str, *args: Any, **kwargs: Any) -> LazyMask:
    """As transformers calls a mask function: everything by keyword."""
    build = ALL_MASK_ATTENTION_FUNCTIONS[original]
    padding: Tensor | None = kwargs.get("attention_mask")
    device = kwargs.get("device", "cpu" if padding is None else padding.device)
    shape = (kwargs["batch_size"], 1, kwargs["q_length"], kwargs["kv_length"])
    dtype = kwargs.get("dtype", torch.float32) if original == "eager" else torch.bool
    offset = kwargs.get("q_offset", 0)
    if isinstance(
        offset, Tensor
    ):  # a static cache counts on in this tensor before the mask is made
        offset = kwargs["q_offset"] = offset.clone()
    mask = LazyMask(
        lambda: _as_tensor(mask.original(), shape, offset, device), shape, dtype, device
    )
    mask.padding = padding
    mask.custom = bool(kwargs.get("use_vmap", False))
    mask._original = partial(build, *args, **kwargs)
    return mask


def _as_tensor(
    mask: Any, shape: tuple[int, ...], offset: int | Tensor, device: torch.device
) -> Tensor:
    """Only for code that computes with the mask itself; attention functions get `original()`."""
    if isinstance(mask, Tensor):
        return mask
    return torch.ones(shape, dtype=torch.bool, device=device).tril(int(offset))


def _attention(
    original: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """The original attention function, for every path that is not a wired layer's."""
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.original()
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Any = eager if original == "eager" else AttentionInterface()[original]
    return function(module, query, key, value, attention_mask, **kwargs)
