"""Which plans have their layers recorded as CUDA graphs (see `wire`), and what that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core.plan import KEEP_ALL, RECORDED_SHARE, recorded_bytes

if TYPE_CHECKING:
    from .job import Job
    from .space import Found


def beside(job: Job) -> int:
    """Bytes of recorded layers beside what waits for backward in any case: what they hand to each other both ways, and
    the adapters' gradients before they are handed out.
    """
    return 3 * job.stream * job.facts.layers + int(job.gradients)


def is_recorded(found: Found, *, left: float, card: int) -> bool:
    """Whether all is kept on the card, and there is room.

    left: bytes that the plan leaves of the budget. card: of the card.
    """
    job, space = found.space.job, found.space
    kept = all(layer == KEEP_ALL for layer in found.layers()) and space.tile is None
    elsewhere = space.homes.embedding or space.homes.head
    if not kept or elsewhere or job.full or job.nf4_kv or job.facts.own:
        return False
    return recorded_bytes(job.facts, job.tokens) <= min(card // RECORDED_SHARE, left - beside(job))
