"""`hotloop verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import console, examples, print_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@examples(
    "hotloop verify HuggingFaceTB/SmolLM2-135M-Instruct --bits 16",
    "hotloop verify ./my-model --data rows.jsonl --bisect",
)
def verify(
    model: Annotated[str, typer.Argument(help="Hub id, directory or .gguf file.")],
    data: Annotated[
        str | None, typer.Option(help="Rows to measure on; default: random tokens.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens in the batch, at most.")] = 256,
    bits: Annotated[int, typer.Option(help="4 or 16.")] = 4,
    lora: Annotated[int, typer.Option(min=0, help="Rank of the adapter; 0: none.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect", help="Turn ops off one at a time and name the one that moves the error."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compare loss and every gradient, wired and eager, with fp32 truth. Exit status 1 if any is worse."""
    from hotloop.loading import load
    from hotloop.lora import add_lora
    from hotloop.verify import verify as compare

    loaded, tokenizer = load(model, bits=bits, max_seq_len=tokens)
    if lora:
        loaded = add_lora(loaded, r=lora)
    else:
        loaded.requires_grad_(True)
    batch = (
        _random(loaded.config.vocab_size, tokens, seed)
        if data is None
        else _rows(data, tokenizer, tokens)
    )
    report = compare(loaded, batch, bisect=bisect)
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(str(report), markup=False, highlight=False)
    if not report.ok:
        raise typer.Exit(1)


def _random(vocabulary: int, tokens: int, seed: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def _rows(path: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> dict[str, Any]:
    """As many of the first rows as fit, packed; a first row that is too long is cut."""
    from hotloop.training.batches import collate
    from hotloop.training.recipe import DataSection
    from hotloop.training.render import Renderer, find_form
    from hotloop.training.rows import read_rows

    section = DataSection(path=path)
    records = read_rows(path)
    renderer = Renderer(tokenizer, section, find_form(section, records[0]))
    rows = [renderer(records[0], f"{path}, row 1")[:tokens]]
    for number, record in enumerate(records[1:], start=2):
        row = renderer(record, f"{path}, row {number}")
        if sum(map(len, rows)) + len(row) > tokens:
            break
        rows.append(row)
    return collate([rows])
