"""Which passes through a model's layers are recorded, and how much memory that takes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .recorded import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotloop_engine.attention import Sequences

PASSES_BEFORE = 8
"""Of one kind, which run as ever: kernels are compiled by then, and products have been tried out (`gemm`)."""

KINDS = 8
"""Kinds of batch with recordings at a time; the one that was longest not met makes room."""

WORTH = 64
"""Passes after which recordings have spared more than they cost. Where one with fewer makes room, as in a data set of
many lengths, batches have to come twice as often from then on before they are recorded.
"""


@dataclass(eq=False)
class Recorder:
    """What is recorded of one model. now: the kind of the pass at hand, None where that runs as ever.

    room: bytes that recordings may take on a card, asked for before a kind is recorded.
    need: bytes of one kind with so many tokens.
    """

    room: Callable[[torch.device], int]
    need: Callable[[int], int]
    now: Kind | None = None
    _passes_before: int = PASSES_BEFORE
    _kinds: OrderedDict[tuple[object, ...], Kind] = field(default_factory=OrderedDict)

    @contextmanager
    def passing(self, sequences: Sequences | None, *more: object) -> Iterator[None]:
        """A pass over these sequences, None for one that is not to be recorded. more: what else makes a kind."""
        self.now = None if sequences is None else self._kind(sequences, more)
        try:
            if self.now is not None:
                assert sequences is not None
                self.now.begin(sequences)
            yield
        finally:
            if self.now is not None:
                self.now.passing = None
            self.now = None

    def clear(self) -> None:
        """Drops all recordings and their memory."""
        self._kinds.clear()

    def __getstate__(self) -> dict[str, object]:
        """A copy of the model has recordings of its own."""
        return {**self.__dict__, "now": None, "_kinds": OrderedDict()}

    def _kind(self, sequences: Sequences, more: tuple[object, ...]) -> Kind | None:
        if threading.current_thread() is not threading.main_thread():
            return None  # replicas run side by side
        key = (sequences.device, sequences.tokens, sequences.count, sequences.longest, *more)
        kind = self._kinds.get(key)
        if kind is None:
            self._forget()
            kind = self._kinds[key] = Kind()
        self._kinds.move_to_end(key)
        kind.passes += 1
        if kind.refused or kind.busy or (not kind.layers and kind.passes <= self._passes_before):
            return None
        if not kind.bytes:
            kind.bytes = self.need(sequences.tokens)
            kind.refused = not self._make_room(kind, sequences.device)
            if not kind.refused:
                torch.cuda.empty_cache()  # what passes took so far: recordings have memory of their own
        return None if kind.refused else kind

    def _make_room(self, kind: Kind, device: torch.device) -> bool:
        """Whether a kind's recordings have room, if need be after those that were longest not met are dropped."""
        others = {key: k for key, k in self._kinds.items() if k.layers and k is not kind}
        while True:
            taken = sum(k.bytes for k in others.values())
            if len(others) < KINDS and kind.bytes <= self.room(device) - taken:
                return True
            key = next((key for key, k in others.items() if not k.busy), None)
            if key is None or kind.bytes > self.room(device):
                return False
            if self._kinds.pop(key).begun < WORTH:
                self._passes_before *= 2
            del others[key]

    def _forget(self) -> None:
        """Ragged batches bring new kinds without end: of those without recordings the longest not met goes."""
        if len(self._kinds) >= 64 * KINDS:
            key = next((key for key, kind in self._kinds.items() if not kind.layers), None)
            if key is not None:
                del self._kinds[key]
