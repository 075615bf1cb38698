"""What gradients take while they are made: a plan holds a batch that adds to those of earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .kinds import Costs
    from .space import Found


def unaccumulated(found: Found) -> int:
    """Bytes that a plan's peak is lower where no gradient is left from an earlier batch.

    A gradient then comes with its layer's backward, so the loss and the last layers, where most
    is kept, have hardly any beside them, and the first layers have all.
    """
    space, job = found.space, found.space.job
    early, late = space.costs[found.early], space.costs[found.late]
    below, above = found.count, space.layers - found.count
    lower, upper = space.early(early, below), space.late(late, above)
    leaving = max(lower.leaving - upper.leaving, 0)
    # (bytes beside gradients, how many layers have theirs): the worst moment of the loss and the last
    # two layers, then each run's first and last backward. A layer's own come at its end.
    moments = [(lower.kept + upper.kept + upper.moment + leaving, min(above - 1, 1))]
    moments += [(lower.kept + _alone(late), above - 1)] if above > 1 else []
    moments += [(lower.moment, above), (_alone(early), space.layers - 1)] if below else []
    each = job.gradients / space.layers
    peak = max(size for size, _ in moments) + job.gradients
    return max(0, int(peak - max(size + layers * each for size, layers in moments)))


def _alone(costs: Costs) -> int:
    """Bytes of a layer's backward when nothing of the layers above is left."""
    return costs.kept + costs.x_kept + costs.backward
