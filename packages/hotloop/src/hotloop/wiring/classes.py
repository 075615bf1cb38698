"""Wired classes: a subclass of the module's own class that keeps its name, and survives pickling and deepcopy."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

STATE = "_hotloop"
"""The attribute that holds a wired module's state; a module without it runs its own forward."""

_roles: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {}


def role(
    name: str, *, call: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the forward of one kind of wired module: forward(module, original_forward, *args, **kwargs).

    call: also replaces `__call__`, as call(module, original_call, *args, **kwargs).
    """

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        _roles[name] = (forward, call)
        return forward

    return register


@functools.cache
def wired_class(original: type[nn.Module], name: str) -> type[nn.Module]:
    """The subclass of `original` that runs the forward of role `name`.

    It keeps `__name__`, `__qualname__` and `__module__`, so config.json, wrap policies and messages see the original.
    """
    run, call = _roles[name]
    own_forward = original.forward
    # transformers wraps the forward of a checkpointing layer in `__init_subclass__`, or calls the checkpoint from
    # `__call__` (older versions). The plan decides what is recomputed, so both are passed by: forward is assigned
    # after the class statement, and `__call__` is torch's own unless the role brings one.
    metaclass: Any = type(original)
    wired: type[nn.Module] = metaclass(
        original.__name__,
        (original,),
        {"__module__": original.__module__, "__qualname__": original.__qualname__},
    )

    @functools.wraps(own_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if STATE not in self.__dict__:  # undone, but somebody kept this method
            return own_forward(self, *args, **kwargs)
        return run(self, functools.partial(own_forward, self), *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (original, name), self.__dict__.copy()

    # torch.compile runs a wired module as it is: there is nothing in hand-written kernels, streams and events that
    # it could fuse, and tracing them costs minutes.
    wired.forward = torch.compiler.disable(forward)
    wired.__reduce_ex__ = reduce  # type: ignore[method-assign]
    if call is None:
        wired.__call__ = nn.Module.__call__  # type: ignore[method-assign]
    else:
        own_call = nn.Module.__call__

        def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return call(self, functools.partial(own_call, self), *args, **kwargs)

        wired.__call__ = __call__  # type: ignore[method-assign]
    return wired


def _rebuild(original: type[nn.Module], name: str) -> nn.Module:
    cls = wired_class(original, name)
    return cls.__new__(cls)
