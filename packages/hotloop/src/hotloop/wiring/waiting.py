"""What a pass through a wired model needs beside its layers: where tensors wait, and which layer made which input."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from hotloop_core import ModelFacts, Placement, Plan
from hotloop_core.plan import saved_tensors
from hotloop_engine.stores import HostActivationStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotloop_engine.blocks import Run
    from torch import Tensor

    from .layer import Shared


class Waiting:
    """Where the tensors of a pass wait: the store that the plan asks for, and who made the input of the next layer."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.loss_follows = False
        self._store: tuple[Plan, HostActivationStore | None] | None = None
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Run]] | None = None

    def fetch(self, index: int) -> Callable[[bool], None] | None:
        """What brings the weights of layer `index` to the device; None where they live there.

        Called with whether backward asks: the pass comes to the layer below next, in forward to the one above.
        """
        homes = self._shared.homes
        if homes is None or index not in homes.layers:
            return None

        def bring(backward: bool) -> None:
            homes.fetch(index, index - 1 if backward else index + 1)

        return bring

    def start_head(self, index: int) -> None:
        """The head sets out for the loss while the last layers are computed, if it lives on the host and one comes."""
        homes = self._shared.homes
        if homes is not None and self.loss_follows and index >= len(self._shared.plan.layers) - 8:
            homes.start_head()

    def store(self, hidden: Tensor) -> HostActivationStore | None:
        """The activation store of the plan at hand; None where it offloads nothing."""
        plan = self._shared.plan
        if self._store is None or self._store[0] is not plan:
            facts = self._shared.facts
            tokens = (
                plan.tokens or hidden.numel() // facts.hidden_size
            )  # a plan may be for any batch
            capacity, ahead = offloaded_bytes(plan, facts, hidden.element_size(), tokens)
            made = None
            if ahead:
                made = HostActivationStore(hidden.device, capacity=capacity, ahead=ahead)
            self._store = (plan, made)
        return self._store[1]

    @property
    def last_store(self) -> HostActivationStore | None:
        """The store of the last pass, for its statistics."""
        return None if self._store is None else self._store[1]

    def below(self, hidden: Tensor) -> Run | None:
        """The run that made `hidden`, if a wired layer did and nobody changed it since."""
        if self._last is None:
            return None
        made, version, run = self._last
        return run() if made() is hidden and version == hidden._version else None

    def passed(self, hidden: Tensor, run: Run | None) -> None:
        """Notes what a layer gave to the next."""
        self._last = None
        if run is not None:
            self._last = weakref.ref(hidden), hidden._version, weakref.ref(run)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None, "_last": None}


def offloaded_bytes(plan: Plan, facts: ModelFacts, width: int, tokens: int) -> tuple[int, int]:
    """(host bytes that a pass of `tokens` needs, the most that one layer puts), 0 where nothing is offloaded.

    width: bytes of an activation.
    """
    layers = [
        sum(
            tokens * (width * saved.elements + saved.extra_bytes)
            for saved in saved_tensors(facts)
            if layer.placement(saved.name) is Placement.OFFLOAD
        )
        for layer in plan.layers
    ]
    most = max(layers)
    # Projections travel with the adapters' columns.
    return sum(layers) + sum(layers) // 32, most + most // 32
