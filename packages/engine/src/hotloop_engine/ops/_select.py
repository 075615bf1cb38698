"""Which implementation of an op runs: by the op's name, the implementation's and the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import NoImplementationError, PluginError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

ENGINE_OPS = (
    "rms_norm",
    "layer_norm",
    "rope",
    "glu",
    "adapter_glu",
    "nf4",
    "linear_cross_entropy",
    "adamw_8bit",
)
CUDA = frozenset({"cuda"})
EVERYWHERE = frozenset({"cpu", "cuda", "mps", "xpu"})


@dataclass(frozen=True)
class _Implementation:
    load: Callable[[], object]
    devices: frozenset[str]


_registered: dict[str, dict[str, _Implementation]] = {}


def register(op: str, name: str, load: Callable[[], object], devices: frozenset[str]) -> None:
    """Adds an implementation of an op.

    Args:
        op: the op's name, one of `ENGINE_OPS` or a new one.
        name: what callers pass as `impl`.
        load: returns a module or object with the functions of the op's Protocol; called when used.
        devices: the device types (`torch.device.type`) that it runs on.

    Raises:
        PluginError: the op has an implementation of that name already.

    """
    names = _registered.setdefault(op, {})
    if name in names:
        raise PluginError(
            f"op {op!r} already has an implementation {name!r}; known: {', '.join(names)}. "
            "Register yours under another name."
        )
    names[name] = _Implementation(load, devices)
    _find.cache_clear()


def implementation(op: str, device: torch.device, impl: str | None = None) -> Any:
    """The module or object that implements `op`, as its Protocol in `hotloop_core.kernels` says.

    `impl=None` takes the first registered one that is made for the device: in the engine, Triton on
    CUDA and the torch reference elsewhere. A named one is returned or refused, never replaced.
    Where Triton interprets, one that is made for CUDA also runs on CPU tensors, if it is named.

    Raises:
        NoImplementationError: none fits, or the one named cannot run there or cannot be loaded.

    """
    return _find(op, device.type, impl)


@cache
def _find(op: str, device_type: str, impl: str | None) -> object:
    names = _registered.get(op)
    if names is None:
        raise NoImplementationError(
            f"no op is called {op!r}; known: {', '.join(sorted(_registered))}."
        )
    offered = "; ".join(f"{n} (on {', '.join(sorted(i.devices))})" for n, i in names.items())
    if impl is None:
        impl = next((n for n, i in names.items() if device_type in i.devices), None)
        if impl is None:
            raise NoImplementationError(
                f"op {op!r} has no implementation for {device_type} tensors; it has {offered}."
            )
    if impl not in names:
        raise NoImplementationError(
            f"op {op!r} has no implementation {impl!r}; it has {offered}. Pass one of them as impl."
        )
    chosen = names[impl]
    if device_type not in chosen.devices and not (device_type == "cpu" and _triton_interprets()):
        raise NoImplementationError(
            f"implementation {impl!r} of op {op!r} cannot run on {device_type} tensors; it has "
            f"{offered}. Move the tensors, or pass impl=None to let the device decide."
        )
    try:
        return chosen.load()
    except ImportError as error:
        raise NoImplementationError(
            f"implementation {impl!r} of op {op!r} cannot be loaded: {error}. Install what is "
            'missing, or name another: impl="reference" runs everywhere.'
        ) from error


def _triton_interprets() -> bool:
    try:
        return import_module("hotloop_engine.ops.kernel").INTERPRETED
    except ImportError:  # no Triton on this platform
        return False


for _op in ENGINE_OPS:
    _folder = f"hotloop_engine.ops.{_op}"
    register(_op, "triton", partial(import_module, f"{_folder}.kernel"), CUDA)
    register(_op, "reference", partial(import_module, f"{_folder}.reference"), EVERYWHERE)
