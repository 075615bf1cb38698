"""`hotloop verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import console, examples, print_json

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_B_STD = 0.01
"""An adapter's after some training: it changes what the model says, and does not drown it."""


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
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; default: the card's.")
    ] = None,
    lora: Annotated[
        int, typer.Option(min=0, help="Rank of the adapter; 0: none, every weight trains.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="Of the random tokens and of the adapter.")] = 0,
    slack: Annotated[
        float, typer.Option(min=0.0, help="How much larger than eager's an error may be.")
    ] = 0.2,
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
    from hotloop.verification import verify as compare

    loaded, tokenizer = load(
        model, bits=bits, dtype=dtype, max_seq_len=tokens, full_finetuning=not lora
    )
    if lora:
        loaded = add_lora(loaded, r=lora)
        _leave_zero(loaded, seed)
    batch = (
        _random(loaded.config.vocab_size, tokens, seed)
        if data is None
        else _rows(data, tokenizer, tokens)
    )
    device = loaded.device
    inputs = {name: v.to(device) if hasattr(v, "to") else v for name, v in batch.items()}
    report = compare(loaded, inputs, slack=slack, bisect=bisect)
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(report, soft_wrap=False)
    if not report.ok:
        raise typer.Exit(1)


def _leave_zero(model: PeftModel, seed: int) -> None:
    """Draws B, which starts at zero: there every gradient of A is zero, and a comparison would show nothing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * _B_STD
            parameter.data.copy_(drawn)


def _random(vocabulary: int, tokens: int, seed: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def _rows(path: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> dict[str, Any]:
    """As many of the first rows as fit, packed; a first row that is too long is cut."""
    from hotloop.training.batches import collate
    from hotloop.training.recipe import DataSection
    from hotloop.training.render import Renderer, Row, find_form
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
    return collate([[Row(row.ids, row.labels) for row in rows]])  # without weights of messages
