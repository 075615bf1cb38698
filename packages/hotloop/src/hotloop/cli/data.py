"""`hotloop data`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import console, examples
from .train import Overrides, RecipeFile  # noqa: TC001 - typer reads them

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hotloop.training.render import Row


@examples(
    "hotloop data recipe.toml",
    "hotloop data recipe.toml --rows 10 --set data.loss_on=all",
    "hotloop data recipe.toml --picture bins.png",
)
def data(
    recipe: RecipeFile,
    rows: Annotated[int, typer.Option(help="How many rows to show.")] = 3,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw these rows padded and packed, as a PNG.", dir_okay=False),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Show rows as the model sees them; trained tokens are green, the others dim."""
    from hotloop_core.packing import pack

    from hotloop.training.data import prepare, read
    from hotloop.training.models import load_tokenizer
    from hotloop.training.recipe import read_recipe

    checked = read_recipe(recipe, overrides=overrides or [])
    records = read(checked.data)
    tokenizer = load_tokenizer(checked)
    prepared = prepare(checked, records, tokenizer)
    for number, row in enumerate(prepared.train[:rows], start=1):
        show_row(tokenizer, row, f"row {number}: {len(row)} tokens, {row.trained} trained")
    console().print(str(prepared.report), markup=False)
    lengths, capacity = [len(row) for row in prepared.train], checked.model.max_seq_len
    packing = pack(lengths, capacity, seed=checked.data.shuffle_seed)
    console().print(f"packed: {packing}", markup=False)
    if picture is not None:
        from hotloop.training.picture import draw_bins

        draw_bins(packing, picture)
        console().print(f"wrote {picture}", markup=False)


def show_row(tokenizer: PreTrainedTokenizerBase, row: Row, title: str) -> None:
    """Prints a row token by token, the trained ones in green."""
    from itertools import groupby

    from rich.panel import Panel
    from rich.text import Text

    text = Text()
    pairs = zip(row.ids.tolist(), (row.labels >= 0).tolist(), strict=True)
    for trained, group in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in group]
        text.append(str(tokenizer.decode(ids)), style="green" if trained else "dim")
    console().print(Panel(text, title=title, title_align="left"), soft_wrap=False)
