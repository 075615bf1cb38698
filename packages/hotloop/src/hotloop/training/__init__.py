"""Training from a recipe: what to train, on which data, how, and where the results go.

Importing this loads neither torch nor transformers; `train` does, when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from .report import RunReport

__all__ = ["Recipe", "read_recipe", "train"]


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> RunReport:
    """Trains as the recipe says and returns what came of it; see `hotloop.training.run.Run` for the steps.

    Args:
        recipe: from `read_recipe(path)`, or made in Python.
        resume: go on from the newest whole checkpoint in `recipe.output.directory`.
        overwrite: replace an earlier run in that directory.

    Raises:
        HotloopError: one of its children, for whatever is wrong with the recipe, the data, the model or the device.

    """
    from .run import Run

    with Run(recipe, resume=resume, overwrite=overwrite) as run:
        return run.train()
