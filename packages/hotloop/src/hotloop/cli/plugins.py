"""`hotloop plugins`."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from hotloop_core import discover, errors

from .terminal import console, examples, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hotloop_core import Plugin


@examples("hotloop plugins", "hotloop plugins --json")
def plugins(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    block: Annotated[
        list[str] | None, typer.Option(help="List without loading this plugin.")
    ] = None,
) -> None:
    """List what is installed, what each plugin claims, and what is broken."""
    found = discover(block=block or ()).plugins
    if as_json:
        print_json([_row(plugin) for plugin in found])
        return
    from rich.table import Table

    table = Table("plugin", "distribution", "version", "what it claims", "state")
    for plugin in found:
        row = _row(plugin)
        claims = [f"{f['name']}: {', '.join(f['model_types'])}" for f in row["families"]]
        claims += [f"{e['name']}: {', '.join(e['quants'])}" for e in row["exporters"]]
        claims += [f"{o['op']}: {o['name']} ({', '.join(o['devices'])})" for o in row["ops"]]
        state = "[yellow]blocked[/]" if plugin.blocked else "[green]ok[/]"
        if plugin.problem:
            state = "[red]broken[/]"
        elif not claims and not plugin.blocked:
            state = "[yellow]brings nothing[/]"
        table.add_row(plugin.name, plugin.distribution, plugin.version, "\n".join(claims), state)
    console().print(table, soft_wrap=False)
    for model_type, names in _contested(found).items():
        console().print(
            f"model_type={model_type!r} is claimed by {' and '.join(names)}: choose with --family NAME, or block one "
            "with --block PLUGIN",
            style="yellow",
            markup=False,
            highlight=False,
        )
    for plugin in found:
        if plugin.problem:
            console().rule(f"[red]{plugin.name} ({plugin.distribution} {plugin.version}) is broken")
            why = plugin.problem if _said_by_us(plugin.problem) else plugin.trace
            console().print(why, markup=False, highlight=False)


def _contested(plugins: Sequence[Plugin]) -> dict[str, list[str]]:
    """The model types that several families claim, with the name and distribution of each."""
    claims: defaultdict[str, list[str]] = defaultdict(list)
    for plugin in plugins:
        for family in plugin.families:
            for model_type in sorted(family.model_types):
                claims[model_type].append(f"{family.name!r} ({plugin.distribution})")
    return {model_type: names for model_type, names in claims.items() if len(names) > 1}


def _said_by_us(problem: str) -> bool:
    """Whether a problem is an error that says what to do, so that a traceback adds nothing."""
    kind = getattr(errors, problem.partition(":")[0], None)
    return isinstance(kind, type) and issubclass(kind, errors.HotloopError)


def _row(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "blocked": plugin.blocked,
        "problem": plugin.problem,
        "trace": plugin.trace,
        "families": [
            {"name": family.name, "model_types": sorted(family.model_types)}
            for family in plugin.families
        ],
        "exporters": [
            {"name": exporter.name, "summary": exporter.summary, "quants": dict(exporter.quants)}
            for exporter in plugin.exporters
        ],
        "ops": [{"op": op.op, "name": op.name, "devices": sorted(op.devices)} for op in plugin.ops],
    }
