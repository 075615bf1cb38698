"""`hotloop plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from .terminal import console, examples, print_json


@examples(
    "hotloop plan meta-llama/Llama-3.1-8B --tokens 8192 --vram 24GiB",
    "hotloop plan ./config.json --tokens 16384 --longest 2048 --lora 16 --card H100",
)
def plan(
    model: Annotated[
        str, typer.Argument(help="Hub id, directory or config.json; no weights are read.")
    ],
    tokens: Annotated[int, typer.Option(help="Tokens in one step on one device.")] = 2048,
    longest: Annotated[int | None, typer.Option(help="Longest sequence among them.")] = None,
    lora: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning, no adapter.")] = False,
    bits: Annotated[int, typer.Option(help="4 or 16.")] = 4,
    vram: Annotated[str | None, typer.Option(help='Memory budget, such as "24GiB".')] = None,
    card: Annotated[
        str | None, typer.Option(help="A card's name, where it is not in this machine.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="As in a recipe.")] = "adamw_8bit",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say where every tensor would live, and what that costs, before anything is loaded."""
    from hotloop.planner import plan as make_plan

    planned = make_plan(
        model,
        tokens=tokens,
        longest=longest,
        lora=None if full else lora,
        full_finetuning=full,
        bits=bits,
        vram=vram,
        card=card,
        optimizer=optimizer,
    )
    if as_json:
        layers = [
            {
                "placements": {k: v.value for k, v in layer.placements.items()},
                "streamed": layer.streamed,
            }
            for layer in planned.layers
        ]
        values = {
            name: getattr(planned, name)
            for name in ("tokens", "longest", "budget", "card", "notes")
        }
        memory, step_ms = dict(planned.memory), dict(planned.step_ms)
        print_json(
            {
                **values,
                "peak_bytes": planned.peak_bytes,
                "memory": memory,
                "step_ms": step_ms,
                "layers": layers,
            }
        )
        return
    console().print(str(planned), markup=False)
