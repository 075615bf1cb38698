"""The forward of a wired norm outside the layers (the final norm), and which modules that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hotloop_engine.ops.layer_norm import layer_norm
from hotloop_engine.ops.rms_norm import rms_norm
from torch import Tensor, nn

from .classes import STATE, role
from .views import norm_eps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotloop_core import Norms

    from .layer import Shared


@dataclass(eq=False)
class NormState:
    """A wired norm's own part."""

    norms: Norms
    shared: Shared

    def __deepcopy__(self, memo: dict[int, Any]) -> NormState:
        """With the model's `shared` where PEFT copies a norm that it trains; with its copy in a copied model."""
        return NormState(self.norms, memo.get(id(self.shared), self.shared))


def leaf_norms(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The norm at `path`, or all norms inside what PEFT put there, which picks one of them at each call."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    norm: nn.Module = module
    if isinstance(module, ModulesToSaveWrapper):
        norm = module.original_module
    elif isinstance(module, BaseTunerLayer):
        norm = module.get_base_layer()
    for name, part in module.named_modules(prefix=path):
        if type(part) is type(norm):
            yield name, part


@role("norm")
def forward(module: nn.Module, own_forward: Callable[..., Any], hidden_states: Tensor) -> Tensor:
    """The norm by the engine's op, in the dtype of its input."""
    state: NormState = module.__dict__[STATE]
    norm: Any = module
    eps = norm_eps(module, state.shared.facts.norm_eps)
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
