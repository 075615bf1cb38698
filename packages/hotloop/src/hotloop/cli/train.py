"""`hotloop train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import console, errors, examples

if TYPE_CHECKING:
    from hotloop.training.run import Run

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value of the recipe: lora.r=32. Repeatable."
    ),
]
RecipeFile = Annotated[
    Path, typer.Argument(help="A recipe, .toml or .yaml; `hotloop schema` has every key.")
]


@examples(
    "hotloop train recipe.toml",
    "hotloop train recipe.toml --set lora.r=32 --set output.directory=runs/r32",
    "hotloop train recipe.toml --dry-run",
    "hotloop train recipe.toml --resume",
)
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show plan, steps and one rendered row; train nothing."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    replan: Annotated[
        bool,
        typer.Option("--replan", help="Out of memory: go on by the plan that would fit."),
    ] = False,
) -> None:
    """Train as a recipe says."""
    from hotloop.training.recipe import read_recipe

    checked = read_recipe(recipe, overrides=overrides or [])
    from hotloop.training.memory import train_within_memory
    from hotloop.training.run import Run

    with Run(checked, resume=resume, overwrite=overwrite, console=errors()) as run:
        if run.main:
            describe(run)
        if dry_run and run.main:
            from .data import show_row

            show_row(run.tokenizer, run.data.train[0], "first row")
        if dry_run:
            return
        if replan:
            report = train_within_memory(checked, run, console=errors())
        else:
            report = run.train()
        if not run.main:
            return
    console().print(str(report), markup=False)
    console().print(f"Talk to it: hotloop chat {report.directory}", markup=False)


def describe(run: Run) -> None:
    """Prints the data, the bins, the steps and the plan."""
    out = errors()
    out.print(str(run.data.report), markup=False)
    if run.recipe.data.packing:
        report = run.data.report  # rows were cut, if at all, before they were packed
        lost = {"rows_overlong": report.overlong, "tokens_dropped": report.dropped_tokens}
        out.print(str(replace(run.bins.packing, **lost)), markup=False)
    schedule = run.recipe.schedule
    ranks = run.processes.num_processes
    batch = schedule.batch_size * schedule.gradient_accumulation * ranks
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    out.print(
        f"{run.steps:,} steps of {batch} bins; {trained:,} trained parameters on "
        + (f"{ranks} processes" if ranks > 1 else str(run.device))
    )
    if run.plan is not None:
        out.print(str(run.plan), markup=False)
