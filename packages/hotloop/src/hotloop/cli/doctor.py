"""`hotloop doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import console, examples, print_json

if TYPE_CHECKING:
    from .machine import Finding


@examples("hotloop doctor", "hotloop doctor --json")
def doctor(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show this machine: what is fast here, what is not, and why."""
    from dataclasses import asdict

    from . import machine

    findings, backends = machine.findings(), machine.attention_backends()
    if as_json:
        print_json(
            {"machine": [asdict(f) for f in findings], "attention": [asdict(b) for b in backends]}
        )
        return
    from rich.table import Table

    table = Table("", "found", "what it means", title="this machine", title_justify="left")
    for finding in findings:
        table.add_row(finding.what, finding.found, _meaning(finding))
    console().print(table, soft_wrap=False)
    attention = Table(
        "attention",
        "here",
        "dtypes",
        "head sizes",
        "packed",
        "window",
        "soft cap",
        "deterministic",
        "why not",
        title="attention backends, in the order of choice",
        title_justify="left",
    )
    for row in backends:
        flags = [
            _mark(getattr(row, name)) for name in ("packed", "window", "softcap", "deterministic")
        ]
        attention.add_row(
            row.name, _mark(row.available), row.dtypes, row.head_sizes, *flags, row.reason
        )
    console().print(attention, soft_wrap=False)


def _meaning(finding: Finding) -> str:
    colour = {"fast": "green", "slow": "yellow", "missing": "red", "": "dim"}[finding.verdict]
    return f"[{colour}]{finding.meaning}[/]"


def _mark(yes: bool) -> str:
    return "[green]yes[/]" if yes else "[dim]no[/]"
