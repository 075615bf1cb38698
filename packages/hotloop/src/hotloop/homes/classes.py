"""The class of a module whose weight lives on the host: a subclass of its own that keeps its name."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

HOME = "_hotloop_home"
"""The attribute that holds a module's home; a module without it is what it was."""


class Housed(nn.Module):
    """What modules at home on the host have in common; always the first base before the module's own class.

    A copy or a pickle is a plain module of the original class that holds the true weight, in host memory.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key != HOME}
        return _plain, (type(self).__bases__[1],), state


class StaysPut(Housed):
    """`.to`, `.cuda`, `.half` leave the weight where and what it is, and move the rest."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        weight = self._parameters["weight"]
        self._parameters["weight"] = None  # the place in the dict, and so the order, is kept
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight


class HousedModel(Housed):
    """The model itself: its device is that of what computes, not of the first parameter, which may be on the host."""

    @property
    def device(self) -> Any:
        """The device of the model's resident weights."""
        home = self.__dict__.get(HOME)
        return super().device if home is None else home.device  # type: ignore[misc]


def house(module: nn.Module, kind: type[Housed], home: object) -> None:
    """Makes `module` one of `kind`, with its home."""
    module.__dict__[HOME] = home
    module.__class__ = housed_class(type(module), kind)


@functools.cache
def housed_class(original: type[nn.Module], kind: type[Housed]) -> type[nn.Module]:
    """The subclass of `original` with the methods of `kind`, under the original's name."""
    metaclass: Any = type(original)
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return metaclass(original.__name__, (kind, original), names)


def _plain(original: type[nn.Module]) -> nn.Module:
    return original.__new__(original)
