"""README.md of an export: what it was made of, on what, how, and what was measured, from the run directory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError, ExportError
from hotloop_core.files import write_atomically

from hotloop.loading.intact import read_object

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hotloop_core import ExportReport

MARK = "<!-- Written by hotloop export; a card without this line is never replaced. -->"


def write_card(
    directory: Path, report: ExportReport, facts: Mapping[str, Any], *, name: str
) -> Path | None:
    """Writes `directory`/README.md, unless somebody wrote one by hand; returns its path, None where it was left alone.

    facts: see `run_facts`.

    Raises:
        ExportError: it cannot be written.

    """
    card = directory / "README.md"
    try:
        if card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
            return None
        write_atomically(card, render_card(report, facts, name=name))
    except OSError as error:
        raise ExportError(
            f"the files in {directory} are whole, but {card.name} beside them cannot be written: "
            f"{error.strerror or error}. Make room for it, or write one yourself."
        ) from error
    return card


def run_facts(run: Path) -> dict[str, Any]:
    """What a card says of a run: base, data, settings, losses, as far as its files say them.

    Raises:
        ConfigError: the directory has no recipe, or a file of it is damaged.

    """
    import yaml

    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise ConfigError(f"{run} is no run directory: it has no recipe.yaml")
    try:
        settings: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{recipe} is not well-formed YAML: {error}\nCopy it again from the run."
        ) from error
    return {
        "recipe": settings,
        "report": _json(run / "report.json"),
        "data": _json(run / "data.json"),
    }


def render_card(report: ExportReport, facts: Mapping[str, Any], *, name: str) -> str:
    """The card as Markdown with the hub's YAML head."""
    recipe: Mapping[str, Any] = facts.get("recipe", {})
    base = recipe.get("model", {}).get("name")
    head = ["---", "library_name: " + {"gguf": "gguf"}.get(report.format, "transformers")]
    if base and not str(base).startswith((".", "/")):
        head += [f"base_model: {json.dumps(base)}"]
        head += [f"base_model_relation: {_relation(report)}"]
    head += ["tags:", "- hotloop", "---"]
    parts = ["\n".join(head), MARK, f"# {name}"]
    parts.append(f"Fine-tuned from `{base}` with Hotloop." if base else "Written by Hotloop.")
    data = _table(recipe.get("data", {}) | _numbers(facts.get("data", {})))
    parts += [f"## Data\n\n{data}"] if data else []
    settings = {
        f"{section}.{key}": value
        for section in ("model", "lora", "schedule")
        for key, value in (recipe.get(section) or {}).items()
        if (section, key) != ("model", "name")
    }
    parts += [f"## Settings\n\n{_table(settings)}"] if settings else []
    measured = _table(_measured(facts.get("report", {})))
    parts += [f"## Measured\n\n{measured}"] if measured else []
    files = [f"| `{f.path.name}` | {f.bytes:,} | `{f.sha256}` |" for f in report.files]
    parts.append("## Files\n\n| file | bytes | SHA-256 |\n|---|---|---|\n" + "\n".join(files))
    parts += (
        ["## Notes\n\n" + "\n".join(f"- {note}" for note in report.notes)] if report.notes else []
    )
    return "\n\n".join(parts) + "\n"


def _relation(report: ExportReport) -> str:
    if "adapter" in report.quants:
        return "adapter"
    return "quantized" if report.format == "gguf" else "finetune"


def _measured(report: Mapping[str, Any]) -> dict[str, Any]:
    labels = {
        "steps": "steps",
        "tokens": "tokens",
        "train_loss": "training loss at the end, nats",
        "held_out_before": "held-out loss before, nats",
        "held_out_after": "held-out loss after, nats",
        "seconds": "seconds",
        "peak_bytes": "peak device memory, bytes",
    }
    return {label: report[key] for key, label in labels.items() if report.get(key) is not None}


def _numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if isinstance(value, int | float)}


def _table(values: Mapping[str, Any]) -> str:
    rows = [
        f"| {key} | {_cell(value)} |"
        for key, value in values.items()
        if value not in (None, [], {})
    ]
    return "| | |\n|---|---|\n" + "\n".join(rows) if rows else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def _json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
