"""The fastest plan that fits.

Class. Layers are alike, so a plan is: how many layers from the bottom are of one kind (`kinds`: a
placement for each tensor), of which kind the rest is, how many layers stream their weights (spread
evenly), whether embedding and head live on the host, and how many tokens are taken at once (all, or
one of `TILES`). Every such plan is evaluated but those that cannot win: the answer is exact within
the class. Of the streamed layers the fewest that fit are taken, since each costs time and frees as
much as any other.

Gap. Time and bytes add up over layers, and one budget binds, so with any number of kinds the best
fractional mix has two. Rounding it to whole layers costs at most the difference between its two
kinds, in one layer. Layers that keep less come first, because backward reaches them when the
others' tensors are free.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from .kinds import Kind, leanest
from .space import NOWHERE, Bounds, Found, Homes, Space

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .cards import Card
    from .job import Job

TILES = (16384, 8192, 4096, 2048, 1024)


def spaces(
    job: Job, card: Card, homes: Iterable[Homes], only: Sequence[Kind] | None = None
) -> Iterator[Space]:
    """One space for each tile and each home, the fastest first, as far as one can know."""
    tiles = (None, *(tile for tile in TILES if tile < job.tokens))
    return _spaces(job, card, tiles, homes, only)


def _spaces(
    job: Job,
    card: Card,
    tiles: Iterable[int | None],
    homes: Iterable[Homes],
    only: Sequence[Kind] | None,
) -> Iterator[Space]:
    choices = tuple(homes)
    for tile in tiles:
        usable = None if only is None else [k for k in only if tile is None or _tiles(k)]
        if usable is None or usable:
            space = Space(job, card, tile, usable)
            yield from map(space.at, choices)


def lean(
    job: Job, card: Card, homes: Iterable[Homes], only: Sequence[Kind] | None = None
) -> Iterator[Space]:
    """The spaces, cut to what long sequences need least memory with: one small tile, and of each layer
    its input at most.
    """
    tiles = (None, min((tile for tile in TILES if tile < job.tokens), default=None))
    return _spaces(job, card, dict.fromkeys(tiles), homes, leanest(job) if only is None else only)


def homes_of(job: Job) -> list[Homes]:
    """Where embedding and head may live; tied, they are one weight."""
    if job.full or not job.outside_frozen:
        return [Homes()]
    both = Homes(embedding=True, head=True)
    return [Homes(), both] if job.facts.tied else [Homes(), Homes(embedding=True), both]


def _tiles(kind: Kind) -> bool:
    return all(p == "recompute" for n, p in kind.placements if n in ("gate_up", "mlp_out"))


def fastest(found: Iterable[Space], bounds: Bounds) -> Found | None:
    """The fastest plan of several spaces; of equals the first."""
    best: Found | None = None
    every = list(found)
    for mixed in (False, True):  # plans of one kind are few, and tell which of two kinds cannot win
        for space in every:
            made = space.fastest(bounds, mixed=mixed, to_beat=inf if best is None else best.ms)
            if made is not None and (best is None or made.order < best.order):
                best = made
    return best


def least(found: Iterable[Space], bounds: Bounds) -> tuple[int, Found] | None:
    """The smallest peak within the host's bound, and its plan; None where the host can hold none."""
    best: tuple[int, Found] | None = None
    for space in found:
        made = space.least(bounds)
        peak = NOWHERE if made is None else int(space.peak(made.bytes()))
        if made is not None and (best is None or peak < best[0]):
            best = peak, made
    return best
