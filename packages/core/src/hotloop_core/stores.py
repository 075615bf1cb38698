"""Where tensors wait between forward and backward, and where frozen weights live: the laws of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, NewType, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Ticket = NewType("Ticket", int)


class ActivationStore(Protocol):
    """Law: get(put(x)) is bitwise x, for any dtype. A Ticket is redeemed once; a second time raises PlanError.

    put returns at once; x's device memory is free for reuse as soon as the copy is done.
    """

    def put(self, x: Tensor) -> Ticket:
        """Takes x away."""
        ...

    def prefetch(self, ticket: Ticket) -> None:
        """Starts the way back."""
        ...

    def get(self, ticket: Ticket) -> Tensor:
        """The tensor again."""
        ...

    def release(self, tickets: Sequence[Ticket]) -> None:
        """Gives up tickets that will not be redeemed (an exception in the middle of a step)."""
        ...


class WeightStore(Protocol):
    """Hands out the frozen weights of a layer, bitwise as they were put, and starts on the next in travel direction."""

    def layer(self, index: int, *, next_index: int | None) -> Sequence[Tensor]:
        """The weights of layer `index`; those of `next_index` set out."""
        ...
