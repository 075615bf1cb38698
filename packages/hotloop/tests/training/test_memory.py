"""A run that runs out of the device's memory: what it says, and how it goes on by a plan that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hotloop.training.directory import RunDirectory
from hotloop.training.memory import OutOfPlanError, train_within_memory
from hotloop.training.run import Run
from transformers import Trainer

if TYPE_CHECKING:
    from hotloop.training.recipe import Recipe

FAILING = 3
"""The step whose memory is not there, once."""


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def losses(recipe: Recipe) -> list[tuple[int, float]]:
    rows = RunDirectory(recipe.output.directory).read_metrics()
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps, counted from one, at which memory ran out; each that is put in at first runs out once."""
    own = Trainer.training_step
    happened: list[int] = []

    def training_step(self: Trainer, *args: Any, **options: Any) -> torch.Tensor:
        step = self.state.global_step + 1
        if step == FAILING and step not in happened:
            happened.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, *args, **options)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return happened


@pytest.mark.parametrize("save_every", [None, 2], ids=["from the start", "from a checkpoint"])
def test_a_run_that_ran_out_ends_with_the_losses_of_one_that_did_not(
    recipe: Recipe, tmp_path: Any, save_every: int | None, failures: list[int]
) -> None:
    recipe = changed(recipe, "schedule", steps=5, save_every=save_every)
    with Run(recipe) as run:
        planned = run.plan
        report = train_within_memory(recipe, run)
    print(planned, report)
    print(losses(recipe))
    whole = changed(recipe, "output", directory=str(tmp_path / "whole"))
    with Run(whole) as run:
        run.train()
    print(losses(whole))
    assert 0
