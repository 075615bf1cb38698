"""E, the operand that a group's GEMMs read: made for a pass, held for the tiles of one, or kept from step to step."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from hotloop_core.kernels import FourBitWeight

from hotloop_engine.ops._select import implementation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from .group import LinearGroup


class Operand:
    """E [N + C, K + C] of one group, see `group.py`."""

    def __init__(self, group: LinearGroup) -> None:
        self._group = group
        self._held: list[Tensor] | None = None
        self.stays = False
        self._kept: Tensor | None = None

    @property
    def at_hand(self) -> Tensor | None:
        """What is held."""
        return self._held[0] if self._held else None

    def keep(self, wanted: bool) -> None:
        """Whether E stays from pass to pass. Then only the adapters are written into it again.

        Of 4-bit weights alone: those cannot be changed in place, as by merging an adapter into a 16-bit one.
        """
        self.stays = wanted and self._group.quantised
        if not self.stays:
            self._kept = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, E is made once: for several passes over parts of the tokens."""
        self._held = []
        try:
            yield
        finally:
            self._held = None

    def make(self, *, backward: bool = False) -> Tensor:
        """E, with the adapters as they are now; those of a kept one are as its last forward found them in backward."""
        e = self._kept
        if e is None:
            e = self._new()
            # What is made in inference mode could not be written to in training.
            if self.stays and not torch.is_inference_mode_enabled():
                self._kept = e
        elif not backward:
            self._adapters_into(e)
        if self._held is not None:
            self._held.append(e)
        return e

    def _new(self) -> Tensor:
        group = self._group
        size = group.n + group.columns, group.k + group.columns
        e = torch.empty(size, dtype=group.dtype, device=group.device)
        if implementation("lora_linear", group.device).extend(group, e):
            return e
        for view, rows in zip(group.views, group.rows, strict=True):
            target = e[rows, : group.k]
            if isinstance(view.weight, FourBitWeight):
                implementation("nf4", group.device).forward(view.weight, out=target)
            else:
                target.copy_(view.weight)
        self._adapters_into(e)
        return e

    def _adapters_into(self, e: Tensor) -> None:
        group = self._group
        group.fill(e[: group.n, group.k :], e[group.n :, : group.k])
