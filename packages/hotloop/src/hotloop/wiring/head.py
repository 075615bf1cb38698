"""What the output head multiplies by: a plain weight, a trained copy of it, or a weight and its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import WireError
from hotloop_engine.ops.lora_linear.reference import dense_weight
from torch import nn
from torch.nn import functional

from .layer import check_modules
from .views import Refusal, linear_view, refuse

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Head:
    """hidden [..., D], weight [V, D], bias [V] or None, as linear cross entropy takes them.

    An adapter of rank r widens both to D + r.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def fused_head(module: nn.Module | None, allow_eager: Collection[str]) -> bool:
    """Whether the loss can be computed from the head's weight; False leaves it to the model's own code, as allowed.

    Raises:
        WireError: there is no head, or it has something that `allow_eager` does not name.
    """
    if module is None:
        raise WireError(
            "the model has no output embeddings, so it has no loss; wire a ...ForCausalLM"
        )
    try:
        check_modules(
            nn.ModuleDict({"lm_head": module})
        )  # its own hooks too, not only those inside
        linear_view(module)
    except Refusal as refusal:
        if refusal.name in allow_eager:
            return False
        raise refuse("the output head", refusal) from None
    return True


def head_weight(module: nn.Module, hidden: Tensor) -> Head:
    """Reads the head now.

    With an adapter, hidden [x, s dropout(x) A^T] and weight [W, B] give x W^T + s dropout(x) A^T B^T: W + s B A is
    never rounded to 16 bits, where a young adapter would vanish beside W.
    """
    view = linear_view(module)
    weight = (
        view.weight
        if isinstance(view.weight, torch.Tensor)
        else dense_weight(view.weight, hidden.dtype)
    )
    lora = view.lora
    if lora is not None:
        x = functional.dropout(hidden, lora.dropout) if lora.dropout else hidden
        thin = functional.linear(x, lora.a_RK.to(x.dtype)) * lora.scale
        with torch.autocast(
            x.device.type, enabled=False
        ):  # cat under it knows two of the 16-bit dtypes at most
            hidden = torch.cat([hidden, thin.to(x.dtype)], dim=-1)
            weight = torch.cat([weight.to(x.dtype), lora.b_NR.to(x.dtype)], dim=-1)
    return Head(hidden=hidden, weight=weight, bias=view.bias)
