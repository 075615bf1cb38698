"""A projection of a wired layer, read at every call for a fraction of what `linear_view` takes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .views import FourBitCache, answers, is_a, linear_view

if TYPE_CHECKING:
    from hotloop_engine.ops.lora_linear import LinearView
    from torch import Tensor


class Projection:
    """One projection, for as long as the layer's modules are the same ones (a `Guard` sees to that).

    What it is then rests on a dozen attributes and parameters. While they are what they were, so is the view, which is
    the same object again: what was made for it can be found by it. A layer's seven are read in 30 us, by `linear_view`
    in 100, and a batch of 4,096 tokens waits for that on a fast card.
    """

    def __init__(self, module: nn.Module, cache: FourBitCache) -> None:
        self._module, self._cache = module, cache
        self._base = self._plain_base()
        self._facts: tuple[object, ...] | None = None
        self._view: LinearView | None = None
        self._identity: tuple[object, ...] = ()
        self._bare: LinearView | None = None

    def view(self) -> LinearView:
        """What the projection is right now; the same object as long as that is the same.

        Raises:
            Refusal: it is something that the grouped GEMMs do not compute.
        """
        facts = None if self._base is None else self._read(self._base)
        if facts is None or facts != self._facts or self._view is None:
            found = linear_view(self._module, self._cache)
            identity = found.identity()
            if self._view is None or identity != self._identity:
                self._view, self._identity = found, identity
                self._bare = found if found.bias is None else replace(found, bias=None)
            self._facts = facts
        return self._view

    def bare(self) -> tuple[LinearView, Tensor | None]:
        """`view` without its bias, and that."""
        view = self.view()
        assert self._bare is not None
        return self._bare, view.bias

    def _plain_base(self) -> nn.Module | None:
        """What holds the weight, where that is a parameter of a plain layer under at most one LoRA layer; else None."""
        module: Any = self._module
        if is_a(type(module), LoraLayer):
            module = module.base_layer
        plain = isinstance(module, nn.Linear) and not is_a(type(module), BaseTunerLayer)
        return module if plain else None

    def _read(self, base: nn.Module) -> tuple[object, ...] | None:
        """All that `linear_view` looks at and that may change while the modules stay; None where it has to look itself.

        Objects go by their ids: the view, or the cache, holds them, so none is used again meanwhile.
        """
        own: Any = base.__dict__["_parameters"]
        weight = own.get("weight")
        # A replica has no parameters; a class that answers for its weight streams it from the host.
        if weight is None or answers(type(base), "weight"):
            return None
        if "quant_state" in weight.__dict__:
            weight = self._cache.view(weight)
        first = (type(base), id(weight), weight.dtype, id(own.get("bias")))
        layer: Any = self._module
        if layer is base:
            return first
        active = layer.active_adapters
        if len(active) != 1 or layer.disable_adapters or layer.merged or layer.lora_variant:
            return None
        (name,) = active
        parts = [layer.__dict__["_modules"][part].__dict__.get("_modules") for part in _PARTS]
        if not all(parts) or name not in parts[0] or type(parts[0][name]) is not nn.Linear:
            return None
        first_matrix, second_matrix, drop = [part[name] for part in parts]
        a = first_matrix.__dict__["_parameters"].get("weight")
        inside = second_matrix.__dict__["_parameters"]
        b = inside.get("weight")
        if a is None or b is None:
            return None
        dropping = isinstance(drop, nn.Dropout) and drop.training and drop.p
        second = (id(a), a.dtype, id(b), b.dtype, id(inside.get("bias")))
        return (*first, *second, name, layer.scaling[name], dropping)


_PARTS = ("lora_A", "lora_B", "lora_dropout")
