"""Writes the tables of "Will it fit?": what the planner says, beside what benchmarks/history has measured.

    python docs/fit.py

A test fails while the page has others.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hotloop.planner import CARDS, Request, find_card, plan, space
from hotloop.planner.task import Task
from hotloop_core import Plan
from hotloop_core.errors import BudgetError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guide" / "will-it-fit.md"
SHAPES = json.loads((ROOT / "benchmarks" / "shapes.json").read_text(encoding="utf-8"))
HISTORY = ROOT / "benchmarks" / "history" / "yardstick.jsonl"
GIB = 2**30
HOST = "100GiB"
HOSTS = {"h100-8": "98.6GiB"}
"""What a run's host could pin, where its plans took nearly all: with it they come out as they ran."""

ALLOWANCES = {
    "h100-8": (128 * 2**20, 8),
    "h200-4": (384 * 2**20, 6),
    "h200-7": (384 * 2**20, 6),
}
"""What a run's plans left for the allocator, where that is not what they leave now: bytes, and percent."""

LAUNCH_MS = dict.fromkeys(ALLOWANCES, (2.0, 3.5))
"""What those plans took the host to need for a layer: the choice among plans may hang on it."""

ONE_LAUNCH = "2026-11-29"
"""Rows of days before it had a step of AdamW that waits for the card after each tensor, as the paged one still does
(decision 21)."""

COMMON: dict[str, Any] = {"card": "H100", "lora": 16, "host": HOST}
FREE = {"H100": "78.5GiB", "H200": "139GiB"}
"""What a process had of a card that was not capped."""

PUBLISHED_GB = {
    "llama3.2-3b": 3.5,
    "llama3-8b": 6,
    "qwen2.5-14b": 8.5,
    "qwen2.5-32b": 26,
    "llama3-70b": 41,
}
"""The least that Unsloth publishes for models of these sizes, QLoRA."""

Row = dict[str, Any]


def rows(*, noted: bool = False) -> list[Row]:
    """Hotloop's rows of the yardstick that ended well.

    noted: also those with a note of what their time or their plan is not good for; memory they tell as well.
    """
    lines = HISTORY.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines if line]
    ours = [row for row in found if row.get("framework") == "hotloop" and not row.get("oom")]
    return [row for row in ours if noted or "note" not in row]


def least() -> str:
    """The least device memory of each shape at 2,048 tokens."""
    table = [
        "| model | least, planned | host memory | tokens/s there | measured peak | published, others |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, published in PUBLISHED_GB.items():
        found = Task.of(SHAPES[name], Request(tokens=2048, **COMMON)).least()
        assert found is not None
        size, chosen = found
        table.append(
            f"| {name} | {size / GIB:.1f} GiB | {chosen.host / GIB:.1f} GiB "
            f"| {2048 / chosen.ms * 1e3:,.0f} | {_measured_least(name)} | {published} GB |"
        )
    return "\n".join(table)


def _measured_least(name: str) -> str:
    """The smallest peak of tensors that the model trained in, with what the process held and its tokens."""
    capped = [r for r in rows(noted=True) if r.get("model") == name and r.get("vram")]
    if not capped:
        return ""
    row = min(capped, key=lambda r: r["peak_gib"])
    tokens = row["batch"] * row["seq"]
    return f"{row['peak_gib']:.1f} GiB (held {row['reserved_gib']:.1f}), {tokens:,} tokens"


def contexts() -> str:
    """The longest single sequences, and two lengths that people ask for."""
    table = [
        "| model | budget | tokens | peak, planned | host memory | s a step | measured | others |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    cases = [
        ("llama3-8b", 23, None, "78,475 published for 24 GB"),
        ("llama3-8b", 78, None, "342,733 published for 80 GB"),
        ("mistral-7b", 23, 57_344, "56K published for 24 GB"),
        ("mistral-7b", 23, 131_072, ""),
    ]
    for name, gib, tokens, others in cases:
        request = Request(tokens=tokens or 2048, vram=f"{gib}GiB", **COMMON)
        length = tokens or Task.of(SHAPES[name], request).longest()
        made = plan(SHAPES[name], tokens=length, vram=f"{gib}GiB", **COMMON)
        longest = "the longest: " if tokens is None else ""
        table.append(
            f"| {name} | {gib} GiB | {longest}{length:,} | {made.peak_bytes / GIB:.1f} GiB "
            f"| {made.host_bytes / GIB:.1f} GiB | {_seconds(made):.1f} "
            f"| {_measured_context(name, gib, tokens)} | {others} |"
        )
    return "\n".join(table)


def _measured_context(name: str, gib: int, tokens: int | None) -> str:
    """The row of that length, or of the longest, with its time per step."""
    fitting = [
        row
        for row in rows()
        if row.get("model") == name
        and row.get("vram") == gib
        and row.get("batch", 1) == 1
        and row.get("seq", 0) >= (tokens or 16_384)
    ]
    if not fitting:
        return ""
    row = (
        max(fitting, key=lambda r: r["seq"])
        if tokens is None
        else min(fitting, key=lambda r: r["seq"])
    )
    return f"{row['seq']:,} tokens, {row['seq'] / row['tok_s']:.1f} s, {_gib(row['peak_gib'])}"


def budgets() -> str:
    """What memory buys: the 8B at 8 x 2048 tokens on an H100."""
    table = [
        "| budget | tokens/s | peak, planned | host memory | what the plan does |",
        "|---:|---:|---:|---:|---|",
    ]
    for gib in (4, 6, 8, 10, 16, 24, 40, 60):
        made = plan(SHAPES["llama3-8b"], tokens=16384, longest=2048, vram=f"{gib}GiB", **COMMON)
        layers = "; ".join(line.strip() for line in str(made).splitlines()[1 : _layer_lines(made)])
        table.append(
            f"| {gib} GiB | {16384 / _seconds(made):,.0f} | {made.peak_bytes / GIB:.1f} GiB "
            f"| {made.host_bytes / GIB:.1f} GiB | {layers} |"
        )
    return "\n".join(table)


def _layer_lines(made: Plan) -> int:
    """How many lines of a printed plan come before the first size."""
    return next(
        i for i, line in enumerate(str(made).splitlines()) if line.startswith("  weights  ")
    )


def cards() -> str:
    """The 8B on each card of the table."""
    table = [
        "| card | memory | link, GB/s | 8B, 4 x 2048: tokens/s | longest context, 8B | longest context, 70B |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for card in CARDS:
        request = Request(tokens=8192, longest=2048, lora=16, card=card)
        task = Task.of(SHAPES["llama3-8b"], request)
        largest = Task.of(SHAPES["llama3-70b"], request).longest()
        try:
            speed = f"{8192 / _seconds(task.plan()):,.0f}"
        except BudgetError:
            speed = "does not fit"
        table.append(
            f"| {card.name} | {card.memory / GIB:.1f} GiB | {card.link_gbs:g} | {speed} "
            f"| {task.longest():,} | {f'{largest:,}' if largest else 'does not fit'} |"
        )
    return "\n".join(table)


def predictions() -> str:
    """Each measured setting of the yardstick beside the planner's prediction for it."""
    table = [
        "| setting | peak of tensors, planned | measured | reserved, planned | measured | step, planned "
        "| measured |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in settings().items():
        made = as_it_ran(row)
        tensors = planned_tensors(made)
        step = _seconds(made)
        table.append(
            f"| {name} | {tensors / GIB:.2f} GiB | {_off(row['peak_gib'], tensors / GIB)} "
            f"| {made.peak_bytes / GIB:.2f} GiB | {_off(row['reserved_gib'], made.peak_bytes / GIB)} "
            f"| {step * 1e3:.0f} ms | {row['step_s'] * 1e3:.0f} ms ({step / row['step_s'] - 1:+.0%}) |"
        )
    return "\n".join(table)


def settings() -> dict[str, Row]:
    """The last row of each setting whose plan is known: nothing recomputed, or what the row's own `placements` says
    (null: the planner's choice within the row's `vram`).
    """
    last: dict[str, Row] = {}
    for row in rows():
        known = "placements" in row or not row.get("ckpt", True)
        if row.get("model") not in SHAPES or not known or "step_s" not in row:
            continue
        how = {"keep": "all kept", None: "planned"}.get(row.get("placements", "keep"), "chosen")
        under = f" under {row['vram']:g} GiB" if row.get("vram") else ""
        bits = "QLoRA" if row["bits"] == 4 else "LoRA, 16-bit base"
        name = (
            f"{row['model']}, {bits}, {row['batch']} x {row['seq']:,}, {how}{under}, {_card(row)}"
        )
        last[name] = row
    return last


def _card(row: Row) -> str:
    return next(name for name in FREE if name in row["card"])


def as_it_ran(row: Row) -> Plan:
    """A row's plan: as `load` placed the weights, for one sequence; then the batch with adapters and weights there."""
    host = f"{row['host_limit_gib']}GiB" if "host_limit_gib" in row else HOSTS.get(row["run"], HOST)
    common = {**COMMON, "card": _card(row), "host": host, "bits": row["bits"]}
    common |= {"placements": row.get("placements", "keep"), "longest": row["seq"]}
    common |= {"vram": f"{row['vram']}GiB" if row.get("vram") else FREE[_card(row)]}
    common |= {"optimizer": "paged_adamw_8bit"} if row["date"] < ONE_LAUNCH else {}
    common |= {"dequantised": bool(row.get("dequantised"))}
    shape, homes = SHAPES[row["model"]], None
    card = find_card(common["card"])
    launch_ms = LAUNCH_MS.get(row["run"], card.launch_ms)
    common |= {"card": replace(card, launch_ms=launch_ms)}
    now = space.SLACK_BYTES, space.SLACK_PERCENT
    size, percent = ALLOWANCES.get(row["run"], now)
    with patch.multiple(space, SLACK_BYTES=size, SLACK_PERCENT=percent):
        if common["placements"] is None:
            homes = plan(shape, tokens=row["seq"], **{**common, "lora": row.get("expected_rank")})
        return plan(shape, tokens=row["batch"] * row["seq"], homes=homes, **common)


def planned_tensors(made: Plan) -> int:
    """Bytes of tensors at the peak of a step of one batch, as the yardstick's are."""
    return made.peak_bytes - made.memory["allocator slack"] - made.unaccumulated


def _seconds(made: Plan) -> float:
    return sum(made.step_ms.values()) / 1e3


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size:.1f} GiB"


def _off(measured: float, predicted: float) -> str:
    return f"{measured:.2f} GiB ({predicted / measured - 1:+.1%})"


def rewritten(text: str) -> str:
    """`text` with what stands between its markers made anew."""
    for make in (least, contexts, budgets, cards, predictions):
        name = make.__name__
        text = re.sub(
            rf"<!-- {name} -->\n.*?<!-- /{name} -->",
            lambda _, name=name, make=make: f"<!-- {name} -->\n{make()}\n<!-- /{name} -->",
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
