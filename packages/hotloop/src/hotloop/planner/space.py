"""One space of plans: what each takes on the device and on the host, how long its step takes, which is
the fastest.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .candidates import CHUNK, Block, Index, Part
from .kinds import Costs, Kind, costs, kinds, leanest
from .timing import Pass, layer_times, passes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hotloop_core import LayerPlan

    from .cards import Card
    from .job import Job

SLACK_BYTES, SLACK_PERCENT = 384 * 2**20, 7
"""What the allocator reserves beside the tensors: a constant, and a share of all else but weights. A test asks that it
hold what was reserved so in every row of benchmarks/history/yardstick.jsonl that had a budget and kept it. Most was
0.41 GiB for 2.94 of tensors (h100-8), 0.71 for 5.84 (h200-7) and, in segments that do not grow, 1.11 for 17.80
(h100-3). With such segments 1.03 were not enough for 17.97 (h100-3, out of memory), and `load` has them grow under a
`vram` only."""

NOWHERE = 2**62
"""Bytes of a plan that the host cannot hold."""

SLOTS = 2
"""Layers that streamed weights have room for on the device: the one at work and the next."""


@dataclass(frozen=True, kw_only=True)
class Homes:
    """Where weights live: embedding and head on the host or not, and how many layers stream theirs;
    None leaves that number to the search.
    """

    embedding: bool = False
    head: bool = False
    streamed: int | None = None


class Bytes(NamedTuple):
    """Bytes by place: on the device the weights, the slots of streamed ones, what is kept for
    backward, the working set and the allocator's slack (what trains is beside them); on the host
    activations, streamed weights, and embedding and head.
    """

    weights: Any
    slots: Any
    kept: Any
    working: Any
    slack: Any
    away: Any
    host_weights: Any
    host_outside: Any


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What must hold a plan, in bytes; infinite where nothing is known. stream: weights may be
    streamed.
    """

    device: float = inf
    host: float = inf
    stream: bool = True


class Space:
    """All plans of the class for one tile and one home of embedding and head.

    Numbers may be arrays that broadcast: the same formulas weigh one plan and search them all.
    """

    def __init__(
        self, job: Job, card: Card, tile: int | None, only: Sequence[Kind] | None = None
    ) -> None:
        self.job, self.tile, self.homes = job, tile, Homes()
        self.times = layer_times(job, card, tile)
        self.layers = job.facts.layers
        found = kinds(job, tile) if only is None else only
        self.kinds, self.costs = _undominated(
            found, [costs(job, kind, self.times, tile) for kind in found]
        )

    def at(self, homes: Homes) -> Space:
        """The same with embedding and head elsewhere."""
        other = copy(self)
        other.homes = homes
        return other

    def early(self, costs: Costs, count: Any) -> Part:
        """The first `count` layers. Backward reaches them when the late ones' tensors are free."""
        stored = _stored(count, costs)
        kept = count * costs.kept + stored * costs.x_kept
        moment = (count > 0) * (kept + costs.backward)
        leaving = (count > 0) * (costs.away + costs.x_away)
        return Part(kept, moment, count * costs.away + stored * costs.x_away, leaving)

    def late(self, costs: Costs, count: Any) -> Part:
        """The last `count` layers, one at least. Worst are the loss, the last layer's backward, or that
        of the one below it, when what the last one kept is free.
        """
        stored, stays = _stored(count, costs), self._stays(costs, count)
        head = (self.job.head or self.job.embedding) * self.homes.head
        leaving = (count > 1) * (costs.away + costs.x_away)
        loss = np.maximum(self.job.loss + leaving, costs.forward) + head
        below = (count > 1) * (costs.backward - stays - costs.kept)
        return Part(
            count * costs.kept + stored * costs.x_kept + stays,
            np.maximum(np.maximum(loss, costs.last + leaving), below),
            count * costs.away + stored * costs.x_away - stays,
            leaving,
        )

    def _stays(self, costs: Costs, count: Any) -> Any:
        """Bytes that the last layer keeps although its kind sends them away."""
        return costs.away + costs.x_away * ((count - 1) % costs.stride == 0)

    def bytes(self, early: Part, late: Part, streamed: Any) -> Bytes:
        """Where the bytes of a plan are at its peak."""
        job = self.job
        kept = early.kept + late.kept
        leaving = np.maximum(early.leaving - late.leaving, 0)  # no more than one layer's worth is
        working = np.maximum(kept + late.moment + leaving, early.moment) - kept
        outside = job.embedding * self.homes.embedding + job.head * self.homes.head
        return Bytes(
            weights=job.weights - outside - streamed * job.layer_weights,
            slots=np.minimum(streamed, SLOTS) * job.layer_weights,
            kept=kept,
            working=working,
            slack=SLACK_BYTES + SLACK_PERCENT * (job.trained + kept + working) // 100,
            away=early.away + late.away,
            host_weights=streamed * job.layer_weights,
            host_outside=outside,
        )

    def peak(self, held: Bytes) -> Any:
        """Bytes on the device."""
        return held.weights + held.slots + self.job.trained + held.kept + held.working + held.slack

    def runs_early(self, costs: Costs, count: Any, streamed: Any) -> tuple[Pass, Pass]:
        """Forward and backward through the first `count` layers."""
        stored, away = _stored(count, costs), self.early(costs, count).away
        return passes(self.times, costs, count, stored, away, streamed)

    def runs_late(self, costs: Costs, count: Any, streamed: Any) -> tuple[Pass, Pass]:
        """Forward and backward through the last `count` layers; the head travels meanwhile."""
        stored, away = _stored(count, costs), self.late(costs, count).away
        head = self.times.head * self.homes.head
        return passes(self.times, costs, count, stored, away, streamed, head)

    @property
    def outside(self) -> float:
        """Milliseconds of a step beside its layers."""
        return sum(self.times.outside.values()) + self.times.embedding * self.homes.embedding

    def fastest(self, bounds: Bounds, *, mixed: bool, to_beat: float) -> Found | None:
        """The fastest plan of one kind of layer, or (mixed) of two, within bounds; of equals the one
        that takes the least of the host. None where none fits, or none takes `to_beat` ms at most.
        """
        best: Found | None = None
        for block in self._blocks(mixed):
            index = block.pick(to_beat + 1e-6, self._room(bounds), bounds.host)
            found = self._fastest_of(index, bounds)
            if found is not None and found.order < (to_beat, inf):
                if best is None or found.order < best.order:
                    best = found
                to_beat = min(to_beat, best.ms)
        return best

    def least(self, bounds: Bounds) -> Found | None:
        """The plan of one kind of layer, or of two of the leanest, that takes the least of the device
        within the host's bound; with as many layers streamed as that lets.
        """
        best: tuple[int, Index, Any, int] | None = None
        for block in chain(self._blocks(False), self._blocks(True, leanest(self.job))):
            index = block.pick(inf, inf, bounds.host)
            early, late = index.parts
            streamed = self._most_streamed(self.bytes(early, late, 0), bounds)
            held = self.bytes(early, late, streamed)
            peak = np.where(_host(held) <= bounds.host, self.peak(held), NOWHERE)
            at = int(np.argmin(peak)) if len(peak) else -1
            if at >= 0 and peak[at] < (NOWHERE if best is None else best[0]):
                best = int(peak[at]), index, streamed, at
        if best is None:
            return None
        _, index, streamed, at = best
        return Found(
            ms=0.0,
            host=0,
            space=self,
            early=int(index.first[at]),
            count=int(index.count[at]),
            late=int(index.second[at]),
            streamed=int(streamed[at]),
        ).weighed()

    def _most_streamed(self, resident: Bytes, bounds: Bounds) -> Any:
        """The most layers that may stream their weights; none where that would free nothing."""
        if self.homes.streamed is not None or not bounds.stream:
            return np.full_like(resident.away, self.homes.streamed or 0)
        room = np.minimum(bounds.host - _host(resident), self.layers * self.job.layer_weights)
        count = (room // self.job.layer_weights).astype(np.int64)
        return np.where(count > SLOTS, count, 0)

    def next_faster(self, found: Found, share: float) -> int | None:
        """The least memory for which a plan of this space is faster by a share of the step; None if
        none is.
        """
        best: int | None = None
        for block in chain(self._blocks(False), self._blocks(True)):
            early, late = block.pick(found.ms * (1 - share), inf, inf).parts
            peak = self.peak(self.bytes(early, late, self.homes.streamed or 0))
            if len(peak) and (best is None or peak.min() < best):
                best = int(peak.min())
        return best

    def _blocks(self, mixed: bool, among: Sequence[Kind] | None = None) -> Iterator[Block]:
        """All plans of one kind of layer, or of two (of these)."""
        every = stacked(self.costs)
        tall = Costs(*(column[:, None] for column in every))
        first = second = np.arange(len(self.kinds))
        counts = np.arange(1, self.layers) if mixed else np.zeros(1, dtype=np.int64)
        if mixed:
            kept = every.kept + every.x_kept / every.stride
            less = kept[:, None] <= kept[None, :]
            mine = np.array([among is None or kind in among for kind in self.kinds])
            first, second = np.nonzero(less & ~np.eye(len(kept), dtype=bool) & mine[:, None] & mine)
        rest = self.layers - counts
        parts = self.early(tall, counts), self.late(tall, rest)
        below = sum(run.total for run in self.runs_early(tall, counts, 0))
        above = sum(run.total for run in self.runs_late(tall, rest, 0)) + self.outside
        for start in range(0, len(first), CHUNK):
            rows = slice(start, start + CHUNK)
            yield Block(first[rows], second[rows], counts, (below, above), parts)

    def _room(self, bounds: Bounds) -> float:
        """Bytes for activations, kept and at work, where every layer streams its weights."""
        streams = bounds.stream and self.homes.streamed is None
        nothing = Part(0, 0, 0, 0)
        held = self.bytes(nothing, nothing, (self.homes.streamed or 0) + self.layers * streams)
        return (bounds.device - self.peak(held)) / (1 + SLACK_PERCENT / 100) + 1

    def _fastest_of(self, index: Index, bounds: Bounds) -> Found | None:
        """The best of these plans within bounds."""
        early, late = index.parts
        streamed = self.streamed(self.bytes(early, late, 0), bounds)
        held = self.bytes(early, late, streamed)
        host = _host(held)
        fits = np.flatnonzero(
            (self.peak(held) <= bounds.device) & (host <= bounds.host) & (streamed <= self.layers)
        )
        if not len(fits):
            return None
        first, second, streamed, host = (
            column[fits] for column in (index.first, index.second, streamed, host)
        )
        count, every = index.count[fits], stacked(self.costs)
        below = count * streamed // self.layers
        runs = (
            *self.runs_early(Costs(*(c[first] for c in every)), count, below),
            *self.runs_late(
                Costs(*(c[second] for c in every)), self.layers - count, streamed - below
            ),
        )
        ms = np.round(sum(run.total for run in runs) + self.outside, 6)
        ties = np.flatnonzero(ms == ms.min())
        at = int(ties[np.argmin(host[ties])])
        return Found(
            ms=float(ms[at]),
            host=int(host[at]),
            space=self,
            early=int(first[at]),
            count=int(count[at]),
            late=int(second[at]),
            streamed=int(streamed[at]),
        )

    def streamed(self, resident: Bytes, bounds: Bounds) -> Any:
        """The fewest layers that must stream their weights; more than there are where none would do."""
        peak = self.peak(resident)
        if self.homes.streamed is not None:
            return np.full_like(peak, self.homes.streamed)
        if not bounds.stream or bounds.device == inf:
            return np.where(peak <= bounds.device, 0, self.layers + 1)
        missing = peak - int(bounds.device)
        return np.where(missing <= 0, 0, -(-missing // self.job.layer_weights) + SLOTS)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One plan of a space: the first `count` layers are of its kind number `early`, the others
    `late`. ms: of a step. host: bytes.
    """

    ms: float
    host: int
    space: Space
    early: int
    count: int
    late: int
    streamed: int

    @property
    def order(self) -> tuple[float, int]:
        """What the search minimises."""
        return self.ms, self.host

    def weighed(self) -> Found:
        """With its own milliseconds and host bytes."""
        ms = round(float(sum(run.total for run in self.passes())) + self.space.outside, 6)
        return replace(self, ms=ms, host=int(_host(self.bytes())))

    def bytes(self) -> Bytes:
        """Where its bytes are at the peak."""
        space = self.space
        early = space.early(space.costs[self.early], self.count)
        late = space.late(space.costs[self.late], space.layers - self.count)
        return space.bytes(early, late, self.streamed)

    def passes(self) -> list[Pass]:
        """Forward and backward through the early, then through the late layers."""
        space, below = self.space, self.count * self.streamed // self.space.layers
        return [
            *space.runs_early(space.costs[self.early], self.count, below),
            *space.runs_late(
                space.costs[self.late], space.layers - self.count, self.streamed - below
            ),
        ]

    def layers(self) -> tuple[LayerPlan, ...]:
        """Every layer; those with streamed weights spread evenly."""
        space, n = self.space, self.space.layers
        made = space.kinds[self.early].layers(self.count, last=False)
        made += space.kinds[self.late].layers(n - self.count, last=True)
        away = [(i + 1) * self.streamed // n > i * self.streamed // n for i in range(n)]
        return tuple(replace(m, streamed=s) for m, s in zip(made, away, strict=True))


def stacked(priced: Sequence[Costs]) -> Costs:
    """The costs of many kinds as one, of arrays."""
    return Costs(*(np.array(column) for column in zip(*priced, strict=True)))


def _host(held: Bytes) -> Any:
    """Bytes on the host."""
    return held.away + held.host_weights + held.host_outside


def _stored(count: Any, cost: Costs) -> Any:
    return -(-count // cost.stride)


def _undominated(found: Sequence[Kind], priced: list[Costs]) -> tuple[list[Kind], list[Costs]]:
    """Without the kinds that another one beats in every respect, or equals and comes before."""
    table = np.array(priced, dtype=np.float64)
    kept: list[int] = []
    for i, row in enumerate(table):
        no_worse = (table <= row).all(1) & (table[:, _STRIDE] == row[_STRIDE])
        better = no_worse & ((table < row).any(1) | (np.arange(len(table)) < i))
        if not better.any():
            kept.append(i)
    return [found[i] for i in kept], [priced[i] for i in kept]


_STRIDE = Costs._fields.index("stride")
