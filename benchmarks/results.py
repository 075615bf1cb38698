"""The README's table of results, from the yardstick's rows.

    python benchmarks/results.py [benchmarks/history/yardstick.jsonl]

Of several rows for one framework and setting the last counts, since the file is only ever appended to. Models cut to
a few layers, which serve profiling, are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HISTORY = Path(__file__).parent / "history" / "yardstick.jsonl"
NAMES = {
    "hotloop": "Hotloop",
    "unsloth": "Unsloth",
    "liger": "Liger",
    "hf": "transformers + PEFT",
    "hf-kbit": "the same, prepared for k-bit",
}
"""Frameworks in the order of the columns."""

Row = dict[str, Any]


def read(path: Path = HISTORY) -> list[Row]:
    """The rows of training steps; none where nothing was measured yet."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    steps = [row for row in rows if "batch" in row and "framework" in row]
    return [row for row in steps if not str(row.get("model")).endswith("layers")]


def table(rows: list[Row]) -> str:
    """Markdown: a line for each card, model and setting, a column for each framework."""
    if not rows:
        return "No rows yet."
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in sorted(rows, key=_order):
        cells.setdefault(_setting(row), {})[row["framework"]] = _cell(row)
    columns = [name for name in NAMES if any(name in line for line in cells.values())]
    lines = [
        "| card | setting | " + " | ".join(NAMES[name] for name in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for setting, line in cells.items():
        measured = (line.get(name, "") for name in columns)
        lines.append(f"| {' | '.join(setting)} | {' | '.join(measured)} |")
    return "\n".join(lines)


def _setting(row: Row) -> tuple[str, ...]:
    parts = [
        str(row.get("model", "llama3-8b")),
        "QLoRA" if row["bits"] == 4 else "LoRA, 16-bit base",
        f"{row['batch']} x {row['seq']:,}",
        "checkpointing" if row["ckpt"] else "nothing recomputed",
    ]
    if row.get("vram"):
        parts.append(f"under {row['vram']:g} GiB")
    return str(row.get("card", "")), ", ".join(parts)


def _order(row: Row) -> tuple[object, ...]:
    """Rows of one setting stay in the order of the file, because sorting is stable."""
    base = (str(row.get("card", "")), str(row.get("model", "")), row["bits"], row["ckpt"])
    return (*base, row.get("vram") or 0, row["seq"], row["batch"])


def _cell(row: Row) -> str:
    if row.get("oom"):
        return "out of memory"
    return f"{row['tok_s']:,} / {row['peak_gib']:.1f} GiB"


if __name__ == "__main__":
    print(table(read(*map(Path, sys.argv[1:2]))))
