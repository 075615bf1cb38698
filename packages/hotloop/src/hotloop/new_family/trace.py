"""What a decoder layer does, seen from outside: which modules run, on what, and how their outputs are added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import UnsupportedError
from torch import Tensor, nn

from .tiny import tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

CLOSE = 1e-4
"""Relative difference of two fp32 results that counts as none."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its path within the layer, its first tensor and its result."""

    path: str
    module: nn.Module
    given: Tensor
    result: Tensor


@dataclass(frozen=True, eq=False)
class Trace:
    """One layer on one batch. layers: the path of the list of layers. x, y: what went into the layer and came out."""

    layers: str
    calls: tuple[Call, ...]
    x: Tensor
    y: Tensor

    def inside(self, path: str, kind: type[nn.Module]) -> list[Call]:
        """The calls of modules of a kind below `path`."""
        return [
            c for c in self.calls if c.path.startswith(f"{path}.") and isinstance(c.module, kind)
        ]

    def norms(self) -> Iterator[Call]:
        """The calls of norms: modules without children whose class says so."""
        for call in self.calls:
            if "norm" in type(call.module).__name__.lower() and not list(call.module.children()):
                yield call


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or equal up to rounding."""
    if a is b:
        return True
    return a.shape == b.shape and bool((a - b).norm() <= CLOSE * b.norm())


def trace(model: Any) -> Trace:
    """Runs a model once and watches its first decoder layer.

    Raises:
        UnsupportedError: no list of decoder layers was found.
    """
    path = layer_list(model)
    layer = model.get_submodule(path)[0]
    names = {module: name for name, module in layer.named_modules()}
    calls: list[Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        result = result[0] if isinstance(result, tuple) else result
        if given is not None and isinstance(result, Tensor):
            calls.append(Call(names[module], module, given, result))

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in layer.modules()]
    try:
        with torch.no_grad():
            model(input_ids=tokens(model.config), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    whole = next(call for call in calls if not call.path)
    return Trace(path, tuple(c for c in calls if c.path), whole.given, whole.result)


def layer_list(model: Any) -> str:
    """The path of the ModuleList with one entry per decoder layer."""
    layers = model.config.num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers and "." in name
    ]
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no ModuleList of its {layers} decoder layers; a family describes one."
        )
    return found[0]
