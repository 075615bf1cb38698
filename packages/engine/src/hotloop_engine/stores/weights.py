"""Frozen weights that live in host memory and visit the device layer by layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hotloop_core.errors import PlanError

from .host import HostBuffer, aligned
from .store import Store

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from .links import Link, Stream


@dataclass(frozen=True, kw_only=True)
class WeightStatistics:
    """What a weight store holds and did. Sizes in bytes.

    layers: it holds. host_bytes, device_bytes: their memory on either side. loads, bytes_back: copies to the device,
    one a layer. stalls: fetches that had to start their own copy.
    copy_ms, wait_ms: device time of the copies, and of the caller's stream waiting for them; None without timing.
    """

    layers: int
    host_bytes: int
    device_bytes: int
    loads: int
    bytes_back: int
    stalls: int
    copy_ms: float | None = None
    wait_ms: float | None = None


@dataclass(slots=True)
class _Layer:
    """One buffer on the host, the tensors in it, and where each begins."""

    buffer: HostBuffer
    host: tuple[Tensor, ...]
    starts: tuple[int, ...]
    nbytes: int


@dataclass(slots=True)
class _Slot:
    """A buffer on the device, the layer that is in it or on its way, and when that has arrived."""

    bytes: Tensor
    layer: int | None = None
    arrived: Any = None


class StreamedWeights(Store):
    """A WeightStore: each layer in one page-locked buffer, and `slots` buffers on the device that they take turns in.

    Layer i always goes to slot i % slots, so the addresses of its tensors stay the same until `rest`. The tensors must
    not be written to. fetch is called from one stream at a time, and work on a layer is queued before the fetch of
    another.

    device: cuda, or cpu for tests.
    layers: the tensors of each layer, of any dtype, on any device; taken one at a time, so that the host holds no more
    than one layer twice while a generator reads a checkpoint. `add_layer` is the other form.
    slots: layers on the device at a time, each as large as the largest layer; allocated at first use.
    timing: measure copies and waits with events.
    link: streams to share with another store.

    Raises:
        BudgetError: the host cannot lock memory for a layer.
    """

    closed = "the weight store was closed; load the model again"

    def __init__(
        self,
        device: torch.device | str,
        layers: Iterable[Sequence[Tensor]] = (),
        *,
        slots: int = 2,
        timing: bool = False,
        link: Link | None = None,
    ) -> None:
        if slots < 1:
            raise PlanError(
                f"slots={slots}: expected 1 or more; with 2, a layer travels while another is used"
            )
        super().__init__(device, link, timing=timing)
        self._count = slots
        self._layers: list[_Layer] = []
        self._slots: list[_Slot] = []
        self._views: list[tuple[Tensor, ...]] = []
        self._loads = self._bytes_back = self._stalls = 0
        for tensors in layers:
            self.add_layer(tensors)

    def __len__(self) -> int:
        return len(self._layers)

    def add_layer(self, tensors: Sequence[Tensor]) -> int:
        """Copies the tensors of one more layer to their home; returns its index. The caller may drop its own then.

        Raises:
            PlanError: the store was used or closed. BudgetError: the host cannot lock memory for it.
        """
        link = self._open()
        if self._slots:
            raise PlanError("a layer was added after the first use; add every layer, then fetch")
        stops = itertools.accumulate((aligned(t.nbytes) for t in tensors), initial=0)
        *starts, nbytes = stops
        buffer = HostBuffer(nbytes, link.device)
        host = tuple(
            buffer.view(start, t.shape, t.dtype).copy_(t.detach())
            for start, t in zip(starts, tensors, strict=True)
        )
        self._layers.append(_Layer(buffer, host, tuple(starts), nbytes))
        return len(self._layers) - 1

    def host(self, index: int) -> tuple[Tensor, ...]:
        """The layer's tensors where they live, for a state dict, an export or a merge: contiguous, read only."""
        self._open()
        return self._layer(index).host

    def views(self, index: int) -> tuple[Tensor, ...]:
        """Where the layer's tensors lie on the device, in the order that they were given; the same objects every time.

        They hold the layer's values from its fetch until a fetch names another layer of its slot, as next or as index.
        """
        self._use()
        self._layer(index)
        return self._views[index]

    def fetch(self, index: int, *, next_index: int | None) -> None:
        """Work queued after this call sees layer `index`; `next_index` sets out, unless the two share a slot.

        Raises:
            PlanError: there is no such layer, or the store is closed.
        """
        link = self._use()
        current = link.current()
        self._layer(index)
        slot = self._slots[index % self._count]
        if slot.layer != index:
            self._stalls += 1
            self._load(index, current)
        self._wait(current, slot.arrived)
        if next_index is not None:
            self._layer(next_index)
            other = self._slots[next_index % self._count]
            if other is not slot and other.layer != next_index:
                self._load(next_index, current)

    def rest(self) -> None:
        """Gives the slots' memory back until the next use; what `views` gave until now holds nothing from then on."""
        if self._slots:
            current = self._open().current()
            for slot in self._slots:
                if slot.arrived is not None:
                    self._wait(current, slot.arrived)
            self._slots, self._views = [], []

    def statistics(self) -> WeightStatistics:
        """What there is and was done so far. With timing, waits for what is under way."""
        self._open()
        return WeightStatistics(
            layers=len(self._layers),
            host_bytes=sum(layer.buffer.flat.nbytes for layer in self._layers),
            device_bytes=sum(slot.bytes.nbytes for slot in self._slots),
            loads=self._loads,
            bytes_back=self._bytes_back,
            stalls=self._stalls,
            copy_ms=self._copies.milliseconds(),
            wait_ms=self._waits.milliseconds(),
        )

    def _drop(self) -> None:
        """What `host` and `views` gave lives as long as somebody holds it."""
        self._layers.clear()
        self._slots.clear()
        self._views.clear()

    def _layer(self, index: int) -> _Layer:
        if not 0 <= index < len(self._layers):
            raise PlanError(f"layer {index} of a weight store with {len(self._layers)} layers")
        return self._layers[index]

    def _use(self) -> Link:
        """Makes the slots and the views into them, once."""
        link = self._open()
        if self._slots or not self._layers:
            return link
        size = max(layer.nbytes for layer in self._layers)
        count = min(self._count, len(self._layers))
        # Made in inference mode (the first use may be an evaluation), they could never be written to outside it.
        with torch.inference_mode(False):
            self._slots = [_Slot(link.empty((size,), torch.uint8)) for _ in range(count)]
            self._views = [
                self._views_in(self._slots[index % self._count].bytes, layer)
                for index, layer in enumerate(self._layers)
            ]
        return link

    @staticmethod
    def _views_in(slot: Tensor, layer: _Layer) -> tuple[Tensor, ...]:
        return tuple(
            slot[start : start + t.nbytes].view(t.dtype).view(t.shape)
            for start, t in zip(layer.starts, layer.host, strict=True)
        )

    def _load(self, index: int, current: Stream) -> None:
        link, layer, slot = self._open(), self._layers[index], self._slots[index % self._count]
        slot.layer = None  # neither the one nor the other, should the copy fail
        link.back.wait_event(current.record_event())  # the last use of what is there now
        self._copy(slot.bytes[: layer.nbytes], layer.buffer.flat[: layer.nbytes], link.back)
        slot.arrived, slot.layer = link.back.record_event(), index
        self._loads += 1
        self._bytes_back += layer.nbytes
