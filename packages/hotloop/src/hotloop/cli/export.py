"""`hotloop export`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .terminal import console, errors, examples, print_json

if TYPE_CHECKING:
    from hotloop_core import ExportReport

    from hotloop.exporting.check import Check
    from hotloop.exporting.source import Opened


@examples(
    "hotloop export runs/first --format gguf --quant q4_k_m,q8_0 --check",
    "hotloop export runs/first --format gguf --quant q3_k_m,imatrix --imatrix data",
    "hotloop export runs/first --format safetensors --output merged",
    "hotloop export runs/first --format gguf --push owner/name",
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
    base: Annotated[
        Literal["trained", "original"],
        typer.Option(
            help="QLoRA: merge into the dequantised 4-bit weights, or the 16-bit originals."
        ),
    ] = "trained",
    compare_bases: Annotated[
        bool,
        typer.Option("--compare-bases", help="QLoRA: held-out loss on both bases, before writing."),
    ] = False,
    imatrix: Annotated[
        str | None,
        typer.Option(
            help='Importance matrix: a file of llama.cpp, or "data": measured on the run\'s.'
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help='Largest file, such as "4GB"; GGUF is one file otherwise.')
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where weights are merged and encoded; default: the card.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Load each GGUF with llama.cpp and compare with the model."),
    ] = False,
    check_text: Annotated[
        Path | None, typer.Option(help="Text to compare on, a paragraph at a time.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Send the files to this repository of the hub: owner/name.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: a new repository is public.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Write a model with its adapter merged in, in a format that other programs load."""
    from hotloop_core import discover
    from hotloop_core.errors import ConfigError

    from hotloop.planner import parse_bytes

    spec = discover().exporter(
        format_
    )  # a misspelt format or quant is told before a model is loaded
    quants = None if quant is None else [spec.resolve(name.strip()) for name in quant.split(",")]
    run = Path(source) / "recipe.yaml"
    if output is None and not run.is_file():
        raise ConfigError(
            f"{source} is not a run directory; say where the files go: --output DIRECTORY"
        )
    if check and format_ != "gguf":
        raise ConfigError("--check loads GGUF files with llama.cpp; leave it out for other formats")
    if check and spec.adapter_quants.intersection(quants or ()):
        raise ConfigError(
            "an adapter is checked on the GGUF of its base: "
            "hotloop.exporting.check.check_gguf(path, model, tokenizer, base=...)"
        )
    # What can be refused is refused before an hour of work, not after it.
    limit = None if max_shard_size is None else parse_bytes(max_shard_size)
    texts = _texts(check_text) if check else ()
    if push is not None:
        from hotloop.exporting.hub import require_name

        require_name(push)
    from hotloop.exporting.card import run_facts, write_card
    from hotloop.exporting.source import open_source

    facts = run_facts(Path(source)) if run.is_file() else {}
    target = output or Path(source) / "export" / format_
    result: dict[str, Any] = {}
    if compare_bases:
        from hotloop.exporting.bases import compare_bases as compare

        both = open_source(source)
        losses = compare(both.model, both.held_out())
        result["held_out_loss"] = asdict(losses)
        errors().print(str(losses), highlight=False)
        del both
    opened = open_source(source, base=base)
    report = _write(opened, target, format_, quants, imatrix, limit, device, overwrite)
    checks = _check(opened, report, texts) if check else []
    files = [file.path for file in report.files]
    card = write_card(target, report, facts, name=opened.name or Path(source).name)
    result |= {
        "format": report.format,
        "quants": report.quants,
        "files": [
            {"path": str(f.path), "bytes": f.bytes, "sha256": f.sha256} for f in report.files
        ],
        "notes": report.notes,
        "checks": [asdict(found) for found in checks],
    }
    if push is not None:
        from hotloop.exporting.hub import push as send

        result["pushed"] = send(
            target, push, files=[*files, target / "README.md"], private=not public
        )
    if as_json:
        print_json(result)
        return
    console().print(str(report), markup=False, highlight=False)
    for found in checks:
        console().print(str(found), markup=False, highlight=False)
    if card is not None:
        console().print(f"  {card.name}: what it was made of", markup=False, highlight=False)
    if push is not None:
        console().print(f"pushed to {result['pushed']}", markup=False, highlight=False)


def _write(
    opened: Opened,
    target: Path,
    format_: str,
    quants: list[str] | None,
    imatrix: str | None,
    max_shard_bytes: int | None,
    device: str | None,
    overwrite: bool,
) -> ExportReport:
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from hotloop.exporting import export as write
    from hotloop.exporting import measure_importance

    importance: Any = imatrix
    if imatrix == "data":
        errors().print("measuring importance on the run's data", highlight=False)
        importance = measure_importance(opened.model, opened.data(), source=str(opened.run))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    with Progress(*columns, TimeElapsedColumn(), console=errors(), transient=True) as bar:
        task = bar.add_task("writing", total=None)
        report = write(
            opened.model,
            opened.tokenizer,
            target,
            format=format_,
            quant=quants,
            importance=importance,
            device=device or ("cuda" if torch.cuda.is_available() else None),
            max_shard_bytes=max_shard_bytes,
            name=opened.name,
            overwrite=overwrite,
            progress=lambda done, total, name: bar.update(
                task, completed=done, total=total, description=name
            ),
        )
    return report if opened.note is None else replace(report, notes=(*report.notes, opened.note))


def _texts(file: Path | None) -> tuple[str, ...]:
    """What to compare on: the paragraphs of `file`, or our own texts."""
    from hotloop_core.errors import ConfigError

    from hotloop.exporting.check import TEXTS, require_llama_cpp

    require_llama_cpp()
    if file is None:
        return TEXTS
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--check-text {file} cannot be read as UTF-8 text: {error}") from error
    texts = tuple(part for part in text.split("\n\n") if part.strip())
    if not texts:
        raise ConfigError(f"--check-text {file} holds no text; expected some paragraphs")
    return texts


def _check(opened: Opened, report: ExportReport, texts: tuple[str, ...]) -> list[Check]:
    from hotloop.exporting.check import check_gguf

    models = [
        file.path
        for file in report.files
        if file.path.suffix == ".gguf"
        and not file.path.stem.endswith(("-imatrix", "-adapter"))
        and ("-of-" not in file.path.stem or "-00001-of-" in file.path.stem)
    ]
    return [check_gguf(path, opened.model, opened.tokenizer, texts=texts) for path in models]
