"""After out of memory: what was planned, what was measured, and the plan that would fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hotloop_core.errors import BudgetError, PlanError
from hotloop_core.plan import amount

from .make import request_again
from .task import Task

if TYPE_CHECKING:
    from hotloop_core import Plan
    from transformers import PreTrainedModel

MARGIN = 1.05
"""Out of memory means that more than what was measured is needed: this much is taken to be."""


def plan_after_oom(model: PreTrainedModel, plan: Plan, measured_bytes: int) -> Plan:
    """The fastest plan that fits if its prediction is off as far as that of `plan` was.

    The device gave `measured_bytes` (what the allocator had reserved when it could get no more) and
    that was too little. Weights stay where they are.

    Raises:
        BudgetError: no plan fits then.
        PlanError: `plan` predicts nothing, or its placements were the caller's choice.

    """
    if not plan.peak_bytes or plan.fixed:
        why = "its placements were chosen, not planned" if plan.fixed else "it predicts no memory"
        raise PlanError(
            f"this plan cannot be made anew: {why}. Plan with placements=None and a vram budget."
        )
    request = replace(request_again(plan), vram=_lowered(plan, measured_bytes))
    task = Task.of(model, request)
    return task.training_as(plan).plan()


def explain_oom(model: PreTrainedModel, plan: Plan, measured_bytes: int) -> str:
    """For an error: what was planned, what was measured, and the plan that would fit, or why none
    does.
    """
    lines = [
        f"planned {amount(plan.peak_bytes)}"
        + (f" of {amount(plan.budget)}" if plan.budget else "")
        + f" for {plan.tokens:,} tokens; the device gave {amount(measured_bytes)} and was asked for more"
    ]
    lines += [f"  {name}: {amount(size)}" for name, size in plan.memory.items()]
    try:
        fits = plan_after_oom(model, plan, measured_bytes)
    except BudgetError as error:
        return "\n".join([*lines, f"No plan for this batch would fit: {error}"])
    except PlanError as error:
        return "\n".join([*lines, str(error)])
    text = str(fits).replace("\n", "\n  ")
    return "\n".join([*lines, "This would fit (--replan retries with it):", f"  {text}"])


def _lowered(plan: Plan, measured_bytes: int) -> int:
    """The budget at which a plan that needs as much more than predicted would fit into what there is."""
    there_is = measured_bytes if plan.budget is None else min(plan.budget, measured_bytes)
    beyond = max(1.0, measured_bytes / plan.peak_bytes) * MARGIN
    return int(there_is / beyond)
