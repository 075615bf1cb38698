"""A run that runs out of the device's memory: what it says, and how it goes on by a plan that fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hotloop.training.directory import RunDirectory
from hotloop.training.memory import OutOfPlanError, train_within_memory
from hotloop.training.run import Run
from hotloop.wiring import receipt_of
from hotloop_core.plan import amount
from transformers import Trainer

if TYPE_CHECKING:
    from hotloop.training.recipe import Recipe

FAILING = 3
"""The step whose memory is not there."""


class Card:
    """Counts the steps, and the memory planned for each, by run; step 3 runs out `times` times."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.steps: list[int] = []
        self.planned: list[int] = []

    def asked(self, trainer: Trainer) -> None:
        step = trainer.state.global_step + 1
        self.steps.append(step)
        self.planned.append(receipt_of(trainer.model).plan.peak_bytes)
        if step == FAILING and self.times:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    own = Trainer.training_step
    card = Card(times=1)

    def training_step(self: Trainer, *args: Any, **options: Any) -> torch.Tensor:
        card.asked(self)
        return own(self, *args, **options)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return card


def of(recipe: Recipe, folder: Path, save_every: int | None = None) -> Recipe:
    """Five steps whose activations, of 32 rows planned at 256 tokens, are enough for a plan to save some."""
    values = {
        "schedule": {"batch_size": 32, "steps": 5, "save_every": save_every, "eval_every": None},
        "data": {"packing": False},
        "output": {"directory": str(folder)},
    }
    changed = {name: getattr(recipe, name).model_copy(update=v) for name, v in values.items()}
    return recipe.model_copy(update=changed)


def losses(recipe: Recipe) -> dict[int, float]:
    rows = RunDirectory(recipe.output.directory).read_metrics()
    found = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(found) == len(dict(found)), "a step was written twice"
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "save_every, steps",
    [(None, [1, 2, 3, 1, 2, 3, 4, 5]), (2, [1, 2, 3, 3, 4, 5])],
    ids=["from the start", "from the newest checkpoint"],
)
def test_a_run_that_ran_out_goes_on_by_a_smaller_plan_to_the_losses_of_one_that_did_not(
    recipe: Recipe, tmp_path: Path, save_every: int | None, steps: list[int], card: Card
) -> None:
    interrupted = of(recipe, tmp_path / "interrupted", save_every)
    with Run(interrupted) as run:
        report = train_within_memory(interrupted, run)
    assert card.steps == steps and report.steps == 5
    assert len(set(card.planned[:FAILING])) == len(set(card.planned[FAILING:])) == 1
    assert card.planned[FAILING] < card.planned[0]
    whole = of(recipe, tmp_path / "whole")
    with Run(whole) as run:
        expected = run.train()
    assert losses(interrupted) == losses(whole)
    assert report.held_out_after == expected.held_out_after


def test_without_planning_again_the_error_says_what_was_planned_measured_and_would_fit(
    recipe: Recipe, tmp_path: Path, card: Card
) -> None:
    with Run(of(recipe, tmp_path / "run")) as run:
        planned = run.plan
        assert planned is not None
        with pytest.raises(OutOfPlanError, match=r"schedule\.batch_size = 1") as caught:
            run.train()
    text, peak = str(caught.value), amount(planned.peak_bytes)
    assert f"planned {peak}" in text and f"the device gave {peak}" in text
    assert "This would fit (--replan retries with it):" in text
    assert caught.value.budget is not None and caught.value.budget < planned.peak_bytes
    assert card.steps == [1, 2, 3]


def test_planning_again_ends_after_so_many_tries(
    recipe: Recipe, tmp_path: Path, card: Card
) -> None:
    card.times = 100
    asked = of(recipe, tmp_path / "run", save_every=2)
    with Run(asked) as run, pytest.raises(OutOfPlanError):
        train_within_memory(asked, run, retries=1)
    assert card.steps == [1, 2, 3, 3]
