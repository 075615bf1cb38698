"""The forward of a wired norm outside the layers (the final norm)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hotloop_engine.ops.layer_norm import layer_norm
from hotloop_engine.ops.rms_norm import rms_norm
from torch import Tensor, nn

from .classes import STATE, role

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotloop_core import Norms

    from .layer import Shared


@dataclass(eq=False)
class NormState:
    """A wired norm's own part."""

    norms: Norms
    shared: Shared


@role("norm")
def forward(module: nn.Module, own_forward: Callable[..., Any], hidden_states: Tensor) -> Tensor:
    """The norm by the engine's op, in the dtype of its input."""
    state: NormState = module.__dict__[STATE]
    norm: Any = module
    eps = state.shared.facts.norm_eps
    with torch.autocast(hidden_states.device.type, enabled=False):
        if state.norms.kind == "layer":
            return layer_norm(
                hidden_states,
                getattr(norm, "weight", None),
                getattr(norm, "bias", None),
                eps=eps,
                impl=state.shared.ops.get("layer_norm"),
            )
        return rms_norm(
            hidden_states,
            getattr(norm, "weight", None),
            eps=eps,
            offset=state.norms.offset,
            impl=state.shared.ops.get("rms_norm"),
        )
