"""Reads projections and norms at the moment of a call, so that whatever PEFT did since is seen."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import WireError
from hotloop_engine.blocks import NormView
from hotloop_engine.ops.lora_linear import LinearView, Lora
from hotloop_engine.ops.nf4 import from_bitsandbytes
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

if TYPE_CHECKING:
    from hotloop_core import Norms
    from hotloop_core.kernels import FourBitWeight
    from torch import Tensor

EXCEPTIONS = {
    "adapters": "several active adapters on one projection",
    "adapter-kind": "adapters other than plain LoRA: DoRA, a bias in B, another PEFT method",
    "weight-kind": "weights that are neither 16/32-bit nn.Linear nor bitsandbytes 4-bit",
    "hooks": "foreign hooks on modules inside a layer",
    "attention-dropout": "dropout of attention probabilities in training",
    "mask": "attention masks that are not causal, windowed, packed or padding",
    "offload": "accelerate's own weight offloading",
}
"""What a block cannot do: the name that `allow_eager` takes, and what it covers."""


class Refusal(Exception):
    """One thing that a block cannot do, by its name in EXCEPTIONS, and what was found."""

    def __init__(self, name: str, found: str) -> None:
        super().__init__(f"{found} ({EXCEPTIONS[name]})")
        self.name = name


def refuse(where: str, refusal: Refusal) -> WireError:
    """The error for a refusal that was not allowed."""
    return WireError(
        f"{where}: {refusal}. Remove it, or let this run through the model's own slower code: "
        f"wire(model, allow_eager={{{refusal.name!r}}})."
    )


class FourBitCache:
    """The 4-bit views of one layer's weights, each made again when its weight moved or was replaced."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, Any, FourBitWeight]] = {}

    def view(self, weight: Tensor) -> FourBitWeight:
        """`from_bitsandbytes(weight)`, remembered."""
        state = weight.quant_state  # type: ignore[attr-defined]
        known = self._known.get(id(weight))
        if known is not None:
            held, address, held_state, view = known
            with torch._C.DisableTorchFunctionSubclass():  # Params4bit would answer both in Python
                here, device = weight.data_ptr(), weight.device
            same = held is weight and held_state is state and address == here
            if same and view.absmax.device == device:
                return view
        if getattr(state, "packing_format_for_cpu", False):
            raise Refusal(
                "weight-kind",
                "a 4-bit weight that bitsandbytes has repacked for this CPU's matrix instructions",
            )
        view = from_bitsandbytes(weight)
        self._known[id(weight)] = (weight, weight.data_ptr(), state, view)
        return view

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": {}}


def linear_view(module: nn.Module, cache: FourBitCache | None = None) -> LinearView:
    """What a projection is right now: base weight, bias, active adapter.

    Raises:
        Refusal: it is something that the grouped GEMMs do not compute.
    """
    module = active_module(module)
    cache = FourBitCache() if cache is None else cache
    if not is_a(type(module), BaseTunerLayer):
        return LinearView(weight=_weight(module, cache), bias=_own(module, "bias"))
    if not is_a(type(module), LoraLayer):
        raise Refusal("adapter-kind", f"an adapter of kind {type(module).__name__}")
    base = module
    while is_a(type(base), BaseTunerLayer):
        base = _own(base, "base_layer")
    return LinearView(
        weight=_weight(base, cache), bias=_own(base, "bias"), lora=_active_lora(module)
    )


@cache
def is_a(kind: type, parent: type) -> bool:
    """`issubclass`, remembered: PEFT's classes are abstract ones, which ask in Python."""
    return issubclass(kind, parent)


def _own(module: nn.Module, name: str, *otherwise: Any) -> Any:
    """`getattr` for parameters and submodules: hundreds a step, for which nn.Module's own way is ten times as long."""
    inside = module.__dict__
    if not answers(type(module), name):
        for kind in ("_parameters", "_modules"):
            if name in inside[kind]:
                return inside[kind][name]
        if otherwise and name not in inside:
            return otherwise[0]  # nn.Module would raise, and format what it says
    return getattr(module, name, *otherwise)


@cache
def answers(kind: type, name: str) -> bool:
    """Whether a class has a property of that name, such as the weight of `homes.Streamed`, which fetches it."""
    return hasattr(kind, name)


def active_module(module: nn.Module) -> nn.Module:
    """The module itself, or the one that runs where PEFT trains a copy (`modules_to_save`)."""
    return saved_module(module) if is_a(type(module), ModulesToSaveWrapper) else module


def plain_module(module: nn.Module) -> nn.Module:
    """`active_module`, where no adapter sits on it: those of PEFT that train norms do it in modules of their own.

    Raises:
        Refusal: an adapter does.
    """
    module = active_module(module)
    if is_a(type(module), BaseTunerLayer):
        raise Refusal("adapter-kind", f"an adapter of kind {type(module).__name__}")
    return module


def check_path(layer: nn.Module, path: str) -> None:
    """Refuses what PEFT put around a whole block: it chooses at each call which of several stands at `path`.

    Raises:
        Refusal: a module on the way to `path` is PEFT's.
    """
    module, walked = layer, ""
    for name in path.split(".")[:-1]:
        module, walked = getattr(module, name, layer), f"{walked}.{name}".lstrip(".")
        if type(module).__module__.startswith("peft."):
            raise Refusal(
                "adapter-kind",
                f"a {type(module).__name__} around the whole of {walked}, where {path} was expected; name the modules "
                f"inside {walked} in its place",
            )


def saved_module(wrapper: Any) -> nn.Module:
    """The module that a ModulesToSaveWrapper runs now."""
    names = (
        wrapper.active_adapters if hasattr(wrapper, "active_adapters") else [wrapper.active_adapter]
    )
    active = [name for name in names if name in wrapper.modules_to_save]
    if wrapper.disable_adapters or not active:
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _active_lora(layer: Any) -> Lora | None:
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
        return None
    if layer.merged:
        return None
    there = _own(layer, "lora_A")
    names = [name for name in layer.active_adapters if name in there]
    if not names:
        return None
    if len(names) > 1:
        raise Refusal("adapters", f"adapters {', '.join(names)} are active together")
    name = names[0]
    a, b = there[name], _own(layer, "lora_B")[name]
    if type(a) is not nn.Linear:  # AdaLoRA
        raise Refusal("adapter-kind", f"an adapter of kind {type(layer).__name__}")
    if name in layer.lora_variant:
        raise Refusal(
            "adapter-kind", f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
        )
    if _own(b, "bias") is not None:
        raise Refusal("adapter-kind", f"adapter {name!r} has a bias in lora_B")
    drop = _own(layer, "lora_dropout")[name]
    probability = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    return Lora(
        a_RK=_own(a, "weight"),
        b_NR=_own(b, "weight"),
        scale=float(layer.scaling[name]),
        dropout=probability,
    )


def _weight(module: nn.Module, cache: FourBitCache) -> Tensor | FourBitWeight:
    weight = _own(module, "weight")
    if getattr(weight, "quant_state", None) is not None:
        return cache.view(weight)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return weight
    raise Refusal("weight-kind", f"a {type(module).__module__}.{type(module).__name__}")


def norm_eps(module: Any, otherwise: float) -> float:
    """Epsilon as the module has it, under the names that transformers and torch use; else the config's."""
    inside = module.__dict__
    for name in ("variance_epsilon", "eps"):
        if name in inside:
            return inside[name]
    return getattr(module, "variance_epsilon", getattr(module, "eps", otherwise))


def norm_view(module: nn.Module, norms: Norms, eps: float) -> NormView:
    """What a norm is right now. eps: for a module that does not say.

    Raises:
        Refusal: an adapter sits on it.
    """
    module = plain_module(module)
    return NormView(
        weight=_own(module, "weight", None),
        bias=_own(module, "bias", None),
        eps=norm_eps(module, eps),
        offset=norms.offset,
        kind=norms.kind,
    )
