"""`hotloop plan`."""

from __future__ import annotations

from dataclasses import asdict
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import console, examples, print_json

if TYPE_CHECKING:
    from hotloop_core import Plan
    from rich.table import Table

    from hotloop.planner import Line, Outlook


@examples(
    "hotloop plan meta-llama/Llama-3.1-8B --tokens 8192 --vram 24GiB",
    "hotloop plan ./config.json --tokens 16384 --longest 2048 --lora 16 --card H100",
    "hotloop plan ./config.json --tokens 8192 --card 24GiB,165TFLOP/s,1008GB/s,25GB/s",
)
def plan(
    model: Annotated[
        str, typer.Argument(help="Hub id, directory or config.json; no weights are read.")
    ],
    tokens: Annotated[int, typer.Option(help="Tokens in one step on one device.")] = 2048,
    longest: Annotated[int | None, typer.Option(help="Longest sequence among them.")] = None,
    lora: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning, no adapter.")] = False,
    bits: Annotated[
        int | None, typer.Option(help="Of the frozen weights, 4 or 16. Default: 4; 16 with --full.")
    ] = None,
    vram: Annotated[str | None, typer.Option(help='Memory budget, such as "24GiB".')] = None,
    host: Annotated[
        str | None,
        typer.Option(help='Host memory that may be pinned, such as "48GiB"; 0 for none.'),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            help="A card's name, or its memory, 16-bit peak, memory rate and host link, where it is "
            "not in this machine."
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="As in a recipe.")] = "adamw_8bit",
    nf4_kv: Annotated[
        bool, typer.Option("--nf4-kv", help="Keys and values wait in NF4: less memory, lossy.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say where every tensor would live, and what that costs, before anything is loaded.

    Below the plan: the same batch in other budgets, and longer sequences in the same budget.
    """
    from hotloop.planner import Request, outlook
    from hotloop.planner import plan as make_plan

    options: dict[str, Any] = {
        "tokens": tokens,
        "longest": longest,
        "lora": None if full else lora,
        "full_finetuning": full,
        "bits": bits,
        "vram": vram,
        "host": host,
        "card": card,
        "optimizer": optimizer,
        "nf4_kv": nf4_kv,
    }
    planned = make_plan(model, **options)
    around = outlook(model, Request(**options))
    if as_json:
        print_json({**_values(planned), "outlook": _outlook_values(around)})
        return
    out = console()
    for line in str(planned).splitlines():
        out.print(fill(line, max(out.width, 40), subsequent_indent=" " * 6), markup=False)
    for table in _tables(planned, around):
        out.print(table, soft_wrap=False)


def _values(planned: Plan) -> dict[str, Any]:
    """A plan for programs: its fields, with placements as text."""
    layers = [
        {
            **asdict(layer),
            "placements": {name: where.value for name, where in layer.placements.items()},
        }
        for layer in planned.layers
    ]
    return {
        **asdict(planned),
        "peak_bytes": planned.peak_bytes,
        "host_bytes": planned.host_bytes,
        "layers": layers,
    }


def _outlook_values(around: Outlook) -> dict[str, Any]:
    def line(row: Line) -> dict[str, Any]:
        return {
            "budget": row.budget,
            "tokens": row.tokens,
            "longest": row.longest,
            "longest_context": row.context,
            "tokens_per_second": row.tokens_per_second,
            "peak_bytes": None if row.plan is None else row.plan.peak_bytes,
            "host_bytes": None if row.plan is None else row.plan.host_bytes,
        }

    return {
        "least_bytes": around.least,
        "budgets": [line(row) for row in around.budgets],
        "contexts": [line(row) for row in around.contexts],
    }


def _tables(planned: Plan, around: Outlook) -> list[Table]:
    from hotloop_core.plan import GIB
    from rich.box import SIMPLE
    from rich.table import Table

    from hotloop.planner import summary

    def gib(size: int | None) -> str:
        return f"{size / GIB:,.2f}" if size else ""

    made: list[Table] = []
    for title, rows, asked in (
        (
            f"{planned.tokens:,} tokens a step in other budgets (memory in GiB)",
            around.budgets,
            "budget",
        ),
        ("one sequence, within this budget (memory in GiB)", around.contexts, "tokens"),
    ):
        columns: dict[str, list[str]] = {asked: [], "tokens/s": [], "peak": [], "host": []}
        columns |= {"longest context": []} if asked == "budget" else {}
        columns["plan"] = []
        for row in rows:
            cells = {
                "budget": gib(row.budget),
                "tokens": f"{row.tokens:,}",
                "tokens/s": f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "",
                "peak": "" if row.plan is None else gib(row.plan.peak_bytes),
                "host": "" if row.plan is None else gib(row.plan.host_bytes),
                "longest context": f"{row.context:,}",
                "plan": "does not fit" if row.plan is None else summary(row.plan),
            }
            for name, column in columns.items():
                column.append(cells[name])
        if not planned.step_ms:  # the card is unknown
            del columns["tokens/s"]
        table = Table(*columns, title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for column in table.columns[:-1]:
            column.justify = "right"
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*cells)
        made += [table] if rows else []
    return made
