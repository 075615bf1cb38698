"""Where tensors wait between forward and backward, and where frozen weights live: the laws of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Ticket(Protocol):
    """A tensor that is away. Dropping it gives its place back, redeemed or not: an exception leaves nothing behind."""

    @property
    def nbytes(self) -> int:
        """Bytes that wait."""
        ...


class ActivationStore(Protocol):
    """Law: get(put(x)) is bitwise x, for any dtype and strides. A Ticket is redeemed once; a second time raises
    PlanError.

    put returns at once; nothing may write to x after it. x's device memory is free for reuse as soon as its copy is
    done and the caller dropped it, in the order of the caller's stream: no call makes the host wait for the device.
    """

    def put(self, x: Tensor) -> Ticket:
        """Takes x away."""
        ...

    def prefetch(self, ticket: Ticket) -> None:
        """Starts the way back."""
        ...

    def get(self, ticket: Ticket) -> Tensor:
        """The tensor again; those put before it set out too, as far as the store has room for."""
        ...

    def settle(self) -> None:
        """Lets go of the device memory of what was put, and of what dropped tickets left."""
        ...


class WeightStore(Protocol):
    """Hands out the frozen weights of a layer, bitwise as they were put, at addresses that stay a layer's own."""

    def views(self, index: int) -> Sequence[Tensor]:
        """Where the weights of layer `index` lie on the device once `fetch` was called: same order as put in."""
        ...

    def fetch(self, index: int, *, next_index: int | None) -> None:
        """Work queued after this call sees the weights of layer `index`; those of `next_index` set out."""
        ...
