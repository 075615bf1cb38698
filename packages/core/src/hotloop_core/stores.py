"""Where tensors wait between forward and backward, and where frozen weights live: the laws of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, NewType, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Ticket = NewType("Ticket", int)


class ActivationStore(Protocol):
    """Law: get(put(x)) is bitwise x, for any dtype. A Ticket is redeemed once; a second time raises PlanError.

    put returns at once; x's device memory is free for reuse as soon as the copy is done. prefetch starts the way back.
    release gives up tickets that will not be redeemed (an exception in the middle of a step).
    """

    def put(self, x: Tensor) -> Ticket: ...

    def prefetch(self, ticket: Ticket) -> None: ...

    def get(self, ticket: Ticket) -> Tensor: ...

    def release(self, tickets: Sequence[Ticket]) -> None: ...


class WeightStore(Protocol):
    """Hands out the frozen weights of a layer, bitwise as they were put, and starts on the next in travel direction."""

    def layer(self, index: int, *, next_index: int | None) -> Sequence[Tensor]: ...
