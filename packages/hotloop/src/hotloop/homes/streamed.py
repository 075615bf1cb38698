"""A projection whose weight waits in host memory and comes to the device for each pass over its layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import UnsupportedError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .classes import HOME, StaysPut
from .weights import dense, passing, refusal_to_change, require_frozen

if TYPE_CHECKING:
    from .homes import Homes


@dataclass(eq=False)
class StreamedHome:
    """Where one projection's weight is. span: the places of its parts among the tensors of its layer."""

    homes: Homes
    layer: int
    path: str
    span: slice
    _view: Any = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where it is multiplied by."""
        return self.homes.device

    def view(self, truth: Tensor) -> Any:
        """The weight over the device memory that its layer passes through; holds it after a fetch of that layer."""
        if self._view is None:
            tensors = self.homes.views(self.layer)[self.span]
            self._view = passing(truth, tensors, self.device)
        return self._view

    def forget(self) -> None:
        """Lets go of the view; the next one is over the memory that the store has then."""
        self._view = None


class Streamed(StaysPut):
    """`weight` is on the device, at an address of its own, and holds its values until another layer comes there.

    The parameter is the true weight, in page-locked host memory. Reading `weight` fetches the layer if it is not
    there; calling the module also starts the next one.
    """

    @property
    def weight(self) -> Any:
        """On the device. `_parameters["weight"]` is the truth."""
        truth = self._parameters["weight"]
        home: StreamedHome | None = self.__dict__.get(HOME)
        if home is None or truth is None:
            return truth
        require_frozen(home.path, truth)
        home.homes.fetch(home.layer)
        return home.view(truth)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module computes; x [..., in]."""
        home: StreamedHome | None = self.__dict__.get(HOME)
        if home is None:
            return super().__call__(x, *args, **kwargs)
        home.homes.fetch_in_turn(home.layer)
        bias = self._parameters.get("bias")
        tracked = x.requires_grad or (bias is not None and bias.requires_grad)
        if args or kwargs or not (tracked and torch.is_grad_enabled()):
            return super().__call__(x, *args, **kwargs)
        return _Projection.apply(x, bias, self)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Any but another weight."""
        if name == "weight" and HOME in self.__dict__ and param is not self._parameters["weight"]:
            raise UnsupportedError(
                refusal_to_change(f"{self.__dict__[HOME].path}.weight: a weight")
            )
        super().register_parameter(name, param)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        home = self.__dict__.pop(HOME, None)  # so that bitsandbytes reads the true quant state
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            if home is not None:
                self.__dict__[HOME] = home

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if HOME in self.__dict__ and f"{prefix}weight" in state_dict:
            raise UnsupportedError(refusal_to_change(f"{prefix}weight: a weight"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Projection(torch.autograd.Function):
    """y = W x + b through the module's own forward; dx = Wᵀ dy with W fetched again, since others have passed since."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: Streamed) -> Tensor:
        ctx.module, ctx.dtype, ctx.bias = module, x.dtype, bias
        ctx.compute = _compute_dtype(module, x)
        return nn.Module.__call__(module, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        module: Streamed = ctx.module
        home: StreamedHome = module.__dict__[HOME]
        home.homes.fetch(home.layer, home.layer - 1)
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy.to(ctx.compute) @ dense(module.weight, ctx.compute)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias.dtype)
        return dx, db, None


def _compute_dtype(module: Streamed, x: Tensor) -> torch.dtype:
    four_bit = getattr(module, "compute_dtype", None)
    if four_bit is not None:
        return four_bit
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
