"""What the output head multiplies by: a plain weight, a trained copy of it, or the weight with its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import WireError
from hotloop_engine.ops.lora_linear.reference import dense_weight

from .views import Refusal, linear_view, refuse

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Head:
    """hidden [..., D], weight [V, D], bias [V] or None, as linear cross entropy takes them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def head_weight(module: nn.Module | None, hidden: Tensor) -> Head:
    """Reads the head now; an adapter on it is added to the weight, so that its gradient comes through the sum.

    Raises:
        WireError: there is no head, or it has something that this loss cannot compute.
    """
    if module is None:
        raise WireError(
            "the model has no output embeddings, so it has no loss; wire a ...ForCausalLM"
        )
    try:
        view = linear_view(module)
    except Refusal as refusal:
        raise refuse("the output head", refusal) from None
    weight = (
        view.weight
        if isinstance(view.weight, torch.Tensor)
        else dense_weight(view.weight, hidden.dtype)
    )
    if view.lora is not None:
        if view.lora.dropout:
            raise WireError(
                "the output head has an adapter with dropout, which no weight can stand for. Set lora_dropout=0, or "
                "take the head out of target_modules and train it whole (modules_to_save)."
            )
        delta = view.lora.scale * (view.lora.b_NR @ view.lora.a_RK)
        weight = weight.to(delta.dtype) + delta
        if hidden.dtype != delta.dtype:
            weight = weight.to(hidden.dtype)
    return Head(hidden=hidden, weight=weight, bias=view.bias)
