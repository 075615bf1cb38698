"""The embedding and the output head with their weight in host memory; tied, they share one."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from hotloop_engine.stores.links import link_to
from torch import Tensor, nn

from .classes import HOME, StaysPut
from .weights import Passing, passing, require_frozen

if TYPE_CHECKING:
    from hotloop_engine.stores.links import Link


class EmbeddingHome:
    """Where an embedding's rows are gathered, and where they go."""

    def __init__(self, path: str, device: torch.device) -> None:
        self.path, self.device = path, device

    def rows(self, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(the distinct rows of a batch, on the device; for each id the number of its row there).

        The host waits for the ids.
        """
        distinct, inverse = torch.unique(ids.to("cpu"), return_inverse=True)
        staged = torch.empty(
            (distinct.numel(), weight.shape[1]),
            dtype=weight.dtype,
            pin_memory=self.device.type == "cuda",
        )
        torch.index_select(weight.detach(), 0, distinct, out=staged)
        return staged.to(self.device, non_blocking=True), inverse.to(self.device, non_blocking=True)


class HostEmbedding(StaysPut):
    """An embedding of which only the rows of the batch travel."""

    def forward(self, input: Tensor) -> Tensor:
        """The module's own forward over the rows of this batch; ids [...], on any device."""
        home: EmbeddingHome | None = self.__dict__.get(HOME)
        if home is None:
            return super().forward(input)
        whole: Any = self._parameters["weight"]
        require_frozen(home.path, whole)
        padding = self.padding_idx
        rows, ids = home.rows(whole, input)
        self._parameters["weight"], self.padding_idx = rows, None  # type: ignore[assignment]
        try:
            return super().forward(ids)
        finally:
            self._parameters["weight"], self.padding_idx = whole, padding


class HeadHome:
    """An output head's weight [V, D] in page-locked host memory, and its one copy on the device while it is held.

    Law: `take` is bitwise the host's; the copy's memory is free as soon as the last holder drops it.
    """

    def __init__(self, path: str, weight: Tensor, link: Link) -> None:
        self.path, self._weight, self._link = path, weight, link
        self._coming: tuple[Tensor, Any] | None = None
        self._here: weakref.ref[Passing] | None = None

    @property
    def device(self) -> torch.device:
        """Where it is multiplied by."""
        return self._link.device

    def start(self) -> None:
        """The weight sets out, for the `take` that follows; what is here or on its way does not set out again."""
        if self._coming is not None or (self._here is not None and self._here() is not None):
            return
        link = self._link
        target = link.empty(self._weight.shape, self._weight.dtype)
        link.back.wait_event(link.current().record_event())  # the memory may still be in use
        link.copy(target, self._weight.detach(), link.back)
        self._coming = (target, link.back.record_event())

    def take(self) -> Any:
        """The weight on the device, for the work that the caller queues from now on."""
        here = None if self._here is None else self._here()
        if here is not None:
            return here
        self.start()
        assert self._coming is not None
        (target, arrived), self._coming = self._coming, None
        self._link.current().wait_event(arrived)
        here = passing(self._weight, [target], self.device)
        self._here = weakref.ref(here)
        return here

    def drop(self) -> None:
        """Gives back what set out and was not taken."""
        if self._coming is not None:
            self._link.current().wait_event(self._coming[1])
            self._coming = None


class HostHead(StaysPut):
    """`weight` is a copy on the device that lives as long as it is held; the parameter is the truth, on the host."""

    @property
    def weight(self) -> Any:
        """On the device."""
        truth = self._parameters["weight"]
        home: HeadHome | None = self.__dict__.get(HOME)
        if home is None or truth is None:
            return truth
        require_frozen(home.path, truth)
        return home.take()


def head_home(path: str, weight: Tensor, device: torch.device) -> HeadHome:
    """The home of a head's weight that is on the host."""
    return HeadHome(path, weight, link_to(device))


def is_linear(module: Any) -> bool:
    """Whether a head is a plain linear layer, whose forward reads `weight` once."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
