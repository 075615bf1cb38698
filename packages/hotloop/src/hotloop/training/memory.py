"""When the device's memory was not enough: what was planned, what was measured, and going on by a plan that fits."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch
from hotloop_core.errors import DeviceMemoryError, HotloopError

from .models import lora_rank

if TYPE_CHECKING:
    from rich.console import Console

    from .recipe import Recipe
    from .report import RunReport
    from .run import Run


class OutOfPlanError(DeviceMemoryError):
    """The device's memory was not enough for the plan. budget: bytes that a new plan should be made for, or None."""

    def __init__(self, text: str, budget: int | None) -> None:
        super().__init__(text)
        self.budget = budget


def out_of_memory(run: Run, error: Exception) -> OutOfPlanError:
    """The error for a run that ran out: what shrinks a step, the plan against what was measured, and what would fit."""
    recipe, plan = run.recipe, run.plan
    advice = [
        (
            recipe.schedule.batch_size > 1,
            "schedule.batch_size = 1 with more gradient_accumulation",
        ),
        (recipe.model.bits == 16 and recipe.lora is not None, "model.bits = 4"),
        (True, f"model.max_seq_len below {recipe.model.max_seq_len}"),
        ((rank := lora_rank(recipe)) > 16, f"lora.r below {rank}"),
        (recipe.schedule.optimizer == "adamw_torch", 'schedule.optimizer = "paged_adamw_8bit"'),
    ]
    options = "; ".join(text for applies, text in advice if applies)
    tokens = recipe.schedule.batch_size * recipe.model.max_seq_len
    text = f"out of device memory in a step of {tokens:,} tokens. What shrinks it, most first: {options}. ({error})"
    if plan is None:
        return OutOfPlanError(text, None)
    from hotloop.planner import explain_oom, plan_after_oom

    cuda = run.device.type == "cuda"
    measured = torch.cuda.max_memory_reserved(run.device) if cuda else plan.peak_bytes
    text = f"{text}\n{explain_oom(run.model, plan, measured)}"
    try:
        return OutOfPlanError(text, plan_after_oom(run.model, plan, measured).budget)
    except HotloopError:
        return OutOfPlanError(text, None)


def train_within_memory(
    recipe: Recipe, run: Run, *, retries: int = 3, console: Console | None = None
) -> RunReport:
    """`run.train()`; where the device's memory was not enough, again by the plan that would fit.

    It goes on from the newest checkpoint, or begins again where there is none.

    Raises:
        OutOfPlanError: no plan would fit, or `retries` were not enough. Else as `Run.train`.

    """
    from .run import Run

    while True:
        try:
            return run.train()
        except OutOfPlanError as error:
            if error.budget is None or not retries:
                raise
            budget, text = error.budget, str(error)
        if console is not None:
            console.print(f"{text}\nPlanning again; tries left: {retries}.", markup=False)
        retries -= 1
        run.release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        resume = run.directory.newest_checkpoint() is not None
        run = Run(recipe, resume=resume, overwrite=not resume, console=console, budget=budget)
