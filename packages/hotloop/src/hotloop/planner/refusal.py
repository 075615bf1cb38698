"""Why nothing fits, the least that would do, and what would fit."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from hotloop_core.plan import GIB, amount

from .search import homes_of

if TYPE_CHECKING:
    from .task import Task


def refusal(task: Task) -> str:
    """For a task whose search found nothing."""
    job, budget = task.job, task.bounds.device
    found, roomy = task.least(), replace(task, host=2**62).least()
    assert roomy is not None
    pin = f"let {enough(roomy[1].host)} of host memory be pinned (host=)"
    changes: list[str] = []
    if found is None:
        more = roomy[0] > budget
        changes.append(pin + f" and raise the budget to {enough(roomy[0])}" * more)
    else:
        changes += [pin] * (roomy[0] <= budget)
        changes.append(f"raise the budget to {enough(found[0])}")
    chooses = replace(task, only=None, homes=tuple(homes_of(job)))
    if task.only is not None and chooses.search() is not None:
        changes.append("let the planner choose (placements=None), which fits")
    longest = task.longest()
    if 0 < longest < job.tokens:
        changes.append(f"train at most {longest:,} tokens a step")
    if job.bits != 4 and not job.full and _fits(task, bits=4, weight_bytes=None):
        changes.append("load the base in 4 bit")
    if longest == 0 and _fits(task, ranks=dict.fromkeys(job.ranks, 1), trained_bytes=None):
        changes.append("lower the LoRA rank")
    size = roomy[0] if found is None else found[0]
    bound = "none" if budget == inf else amount(budget)
    return (
        f"{job.tokens:,} tokens a step need at least {enough(size)}"
        f"{' with these placements' if task.only else ''}; the budget is {bound}, of host memory "
        f"{amount(task.host)} (weights {amount(job.weights)}). To fit: {', or '.join(changes)}."
    )


def enough(size: int) -> str:
    """`amount` rounded up: a budget of what it says holds `size` bytes."""
    return amount(size + (GIB / 200 if size >= GIB / 10 else 2**20 / 20))


def _fits(task: Task, **changes: Any) -> bool:
    """Whether a job with these fields changed fits."""
    found = replace(task, job=replace(task.job, **changes)).least()
    return found is not None and found[0] <= task.bounds.device
