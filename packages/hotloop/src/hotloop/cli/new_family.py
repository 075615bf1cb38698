"""`hotloop new-family`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import console, examples, print_json

if TYPE_CHECKING:
    from hotloop.new_family import NewFamily


@examples("hotloop new-family granite", "hotloop new-family seed_oss --output plugins/seed-oss")
def new_family(
    model_type: Annotated[str, typer.Argument(help="As in the config.json of a checkpoint.")],
    output: Annotated[
        Path | None, typer.Option(help="A new folder; hotloop-MODEL_TYPE by default.")
    ] = None,
    kit: Annotated[bool, typer.Option(help="Run the conformance kit on what was written.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Write a plugin for a model type that none has, guessed from transformers' model, and run the kit on it."""
    from hotloop.new_family import new_family as write

    made = write(model_type, output, kit=kit)
    if as_json:
        print_json(_row(made))
    else:
        _show(made)
    if made.kit is not None and not made.kit.ok:
        raise typer.Exit(1)


def _show(made: NewFamily) -> None:
    notes = ("look at these before you rely on it:", *made.guess.notes)
    console().print(f"wrote {made.directory}", markup=False)
    console().print(*notes, sep="\n  - ", markup=False, highlight=False)
    if made.kit is None:
        return
    verdict = f"{made.kit.passed} checks of the kit pass, {len(made.kit.failures)} do not"
    console().print(verdict, style="green" if made.kit.ok else "red")
    for name, why in made.kit.failures.items():
        console().print(f"  {name}: {why}", markup=False, highlight=False)


def _row(made: NewFamily) -> dict[str, object]:
    return {
        "directory": str(made.directory),
        "notes": made.guess.notes,
        "kit": None
        if made.kit is None
        else {"passed": made.kit.passed, "failures": made.kit.failures},
    }
