"""`hotloop export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import console, errors, examples, print_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@examples(
    "hotloop export runs/first --format gguf --quant q8_0,f16",
    "hotloop export runs/first --format safetensors --output merged",
)
def export(
    source: Annotated[str, typer.Argument(help="A run directory, or a model's name or path.")],
    format_: Annotated[
        str, typer.Option("--format", help="An installed exporter; `hotloop plugins` lists them.")
    ],
    quant: Annotated[
        str | None, typer.Option(help="One or several, with commas; default: the format's first.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory; default: export/FORMAT in the run.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Write a model with its adapter merged in, in a format that other programs load."""
    from hotloop_core import discover
    from hotloop_core.errors import ConfigError

    discover().exporter(format_)  # a misspelt format is told before a model is loaded
    is_run = (Path(source) / "recipe.yaml").is_file()
    if output is None and not is_run:
        raise ConfigError(
            f"{source} is not a run directory; say where the files go: --output DIRECTORY"
        )
    target = output or Path(source) / "export" / format_
    model, tokenizer = _load(source, is_run=is_run)
    from rich.progress import Progress

    from hotloop.exporting import export as write

    with Progress(console=errors(), transient=True) as bar:
        task = bar.add_task("writing", total=None)
        report = write(
            model,
            tokenizer,
            target,
            format=format_,
            quant=None if quant is None else [name.strip() for name in quant.split(",")],
            name=Path(source).resolve().name if is_run else None,
            overwrite=overwrite,
            progress=lambda done, total, name: bar.update(
                task, completed=done, total=total, description=name
            ),
        )
    if as_json:
        files = [{"path": str(f.path), "bytes": f.bytes, "sha256": f.sha256} for f in report.files]
        print_json(
            {
                "format": report.format,
                "quants": report.quants,
                "files": files,
                "notes": report.notes,
            }
        )
        return
    console().print(str(report), markup=False, highlight=False)


def _load(source: str, *, is_run: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not is_run:
        from hotloop.loading import load

        return load(source, bits=16, wire=False)
    from hotloop.training.directory import open_run
    from hotloop.training.models import load_trained

    directory, recipe = open_run(source)
    return load_trained(recipe, directory.trained())
