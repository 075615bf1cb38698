"""What a model's decoder layers do, seen from outside: which modules run, on what, and what they give."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import UnsupportedError
from torch import Tensor, nn

from .kinds import layer_list, own_code
from .tiny import tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CLOSE = 1e-4
"""Relative difference of two fp32 results that counts as none."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its path within the layer, its first tensor, its result, all arguments by name."""

    path: str
    module: nn.Module
    given: Tensor
    result: Tensor
    arguments: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer on one batch: the calls inside it, what went into it and what came out."""

    index: int
    whole: Call
    calls: tuple[Call, ...]

    @property
    def x(self) -> Tensor:
        """The residual stream that entered."""
        return self.whole.given

    @property
    def y(self) -> Tensor:
        """The residual stream that left."""
        return self.whole.result

    @property
    def rotation(self) -> tuple[Tensor, Tensor] | None:
        """cos and sin, as the layer was given them."""
        return self.whole.arguments.get("position_embeddings")

    def inside(self, path: str, kind: type[nn.Module]) -> list[Call]:
        """The calls of modules of a kind below `path`."""
        return [
            c for c in self.calls if c.path.startswith(f"{path}.") and isinstance(c.module, kind)
        ]

    def norms(self) -> Iterator[Call]:
        """The calls of norms: modules without children whose class says so."""
        return (call for call in self.calls if _is_norm(call))


@dataclass(frozen=True, eq=False)
class Trace:
    """A model on one batch. path: of its list of layers. final_norm: the call that got what the last layer gave."""

    path: str
    layers: tuple[Layer, ...]
    final_norm: Call | None


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or equal up to rounding."""
    if a is b:
        return True
    return a.shape == b.shape and bool((a - b).norm() <= CLOSE * b.norm())


def trace(model: Any) -> Trace:
    """Runs a model once and watches its decoder layers and what stands behind them.

    Raises:
        UnsupportedError: no list of decoder layers was found, or the model does not run.
    """
    path = layer_list(model)
    names = {module: name for name, module in model.named_modules()}
    calls: list[Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        result = result[0] if isinstance(result, tuple | list) else result
        if given is not None and isinstance(result, Tensor):
            calls.append(Call(names[module], module, given, result, _named(module, args, kwargs)))

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        with (
            torch.no_grad(),
            own_code(f"model_type={model.config.model_type!r}: a small model of it does not run"),
        ):
            model(input_ids=tokens(model.config), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    layers = tuple(_layer(calls, path, index) for index in range(len(model.get_submodule(path))))
    behind = (c for c in calls if not c.path.startswith(f"{path}.") and _is_norm(c))
    final = next((c for c in behind if same(c.given, layers[-1].y)), None)
    return Trace(path, layers, final)


def _layer(calls: list[Call], path: str, index: int) -> Layer:
    own = f"{path}.{index}"
    whole = next((call for call in calls if call.path == own), None)
    if whole is None:
        raise UnsupportedError(
            f"{own} does not take one tensor and give one, as a decoder layer does; a family describes no other."
        )
    inside = (call for call in calls if call.path.startswith(f"{own}."))
    return Layer(index, whole, tuple(_within(call, own) for call in inside))


def _within(call: Call, layer: str) -> Call:
    path = call.path.removeprefix(f"{layer}.")
    return Call(path, call.module, call.given, call.result, call.arguments)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _is_norm(call: Call) -> bool:
    return "norm" in type(call.module).__name__.lower() and not list(call.module.children())
