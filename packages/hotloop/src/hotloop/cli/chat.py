"""`hotloop chat`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads it
from typing import Annotated

import typer

from .terminal import console, errors, examples


@examples("hotloop chat runs/first", "hotloop chat runs/first --ask 'What is Hotloop?'")
def chat(
    run: Annotated[
        Path, typer.Argument(help="A run directory of `hotloop train` or `hotloop quickstart`.")
    ],
    ask: Annotated[str | None, typer.Option(help="Ask this one question and stop.")] = None,
    system: Annotated[
        str | None, typer.Option(help="System message; default: that of the run.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token.")
    ] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Talk to the model of a run. An empty line ends it, /new starts another conversation."""
    from hotloop.training.directory import open_run

    directory, recipe = open_run(run)
    folder = directory.trained()
    from hotloop.training.answer import answer
    from hotloop.training.models import load_trained

    model, tokenizer = load_trained(recipe, folder)
    system = system or recipe.data.system
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    while question := ask or errors().input("[bold]you>[/] ").strip():
        if question == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": question})
        text = answer(
            model,
            tokenizer,
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            on_text=lambda piece: console().print(piece, end="", markup=False, highlight=False),
        )
        console().print()
        if ask is not None:
            return
        messages.append({"role": "assistant", "content": text})
