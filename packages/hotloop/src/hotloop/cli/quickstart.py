"""`hotloop quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import console, errors, examples, print_json

if TYPE_CHECKING:
    from hotloop.training.report import RunReport


@examples("hotloop quickstart", "hotloop quickstart --output my-first-run --overwrite")
def quickstart(
    output: Annotated[Path, typer.Option(help="The run directory.")] = Path("hotloop-quickstart"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    model: Annotated[str | None, typer.Option(help="Another model, by name or path.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in `hotloop train`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Teach a small model what Hotloop is, in minutes, and write files that other programs load."""
    from dataclasses import asdict

    from hotloop.training.directory import RunDirectory
    from hotloop.training.quickstart import quickstart as carry_out
    from hotloop.training.quickstart import quickstart_recipe

    recipe = quickstart_recipe(output, model=model, overrides=tuple(overrides or ()))
    RunDirectory(output).check(recipe, resume=False, overwrite=overwrite)
    errors().print(f"model: {recipe.model.name}", markup=False, highlight=False)
    report, answers = carry_out(recipe, overwrite=overwrite, console=errors())
    if as_json:
        print_json({"report": asdict(report), "answers": [asdict(answer) for answer in answers]})
        return
    from rich.table import Table

    table = Table("question", "before", "after", show_lines=True)
    for row in answers:
        table.add_row(row.question, row.before, row.after)
    console().print(table, soft_wrap=False)
    console().print(str(report), markup=False, highlight=False)
    console().print(_how_to_run(report), markup=False, highlight=False)


def _how_to_run(report: RunReport) -> str:
    merged = next((p for p in report.exports if p.endswith(".safetensors")), None)
    gguf = next((p for p in report.exports if p.endswith(".gguf")), None)
    lines = ["", "Talk to it:", f"  hotloop chat {report.directory}"]
    if gguf is not None:
        file = Path(gguf).resolve()
        lines += [
            "llama.cpp:",
            f"  llama-cli -m {file} -cnv",
            "Ollama:",
            f"  echo 'FROM {file}' > Modelfile && ollama create hotloop-qa -f Modelfile && ollama run hotloop-qa",
        ]
    if merged is not None:
        folder = Path(merged).resolve().parent
        lines += [
            "transformers:",
            f'  pipe = transformers.pipeline("text-generation", model="{folder}")',
            '  pipe([{"role": "user", "content": "What is Hotloop?"}])',
        ]
    return "\n".join(lines)
