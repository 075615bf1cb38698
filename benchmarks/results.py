"""What was measured: the README's table and docs/results.md, made of the rows in benchmarks/history.

    python benchmarks/results.py            the README's table, printed
    python benchmarks/results.py --page     writes docs/results.md

Files are only ever appended to; of several rows for one thing measured the last counts. Models cut to a few layers,
which serve profiling, are left out of the yardstick.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

HISTORY = Path(__file__).parent / "history" / "yardstick.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
PICTURE = "smollm2-curve.svg"
NAMES = {
    "hotloop": "Hotloop",
    "hotloop-bnb": "Hotloop, bitsandbytes' step",
    "unsloth": "Unsloth",
    "liger": "Liger",
    "hf": "transformers + PEFT",
    "hf-kbit": "the same, prepared for k-bit",
}
"""Frameworks in the order of the columns."""

Row = dict[str, Any]


def lines(path: Path) -> list[Row]:
    """The rows of a file; none where there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def read(path: Path = HISTORY) -> list[Row]:
    """The rows of training steps; none where nothing was measured yet."""
    steps = [row for row in lines(path) if "batch" in row and "framework" in row]
    return [row for row in steps if not str(row.get("model")).endswith("layers")]


def table(rows: list[Row], *, compared: bool = False) -> str:
    """Markdown: a line for each card, model and setting, a column for each framework; all of a line from one run.

    It is the last run that measured another library beside Hotloop: times of different runs, on different machines,
    say nothing of each other.

    compared: only lines in which Hotloop stands beside another.
    """
    if not rows:
        return "No rows yet."
    runs: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in sorted(rows, key=_order):
        if row["framework"] in NAMES:
            of_setting = runs.setdefault(_setting(row), {})
            of_setting.setdefault(str(row.get("run")), {})[row["framework"]] = _cell(row)
    cells = {key: _latest(list(of_setting.values())) for key, of_setting in runs.items()}
    if compared:
        cells = {key: line for key, line in cells.items() if len(line) > 1 and "hotloop" in line}
    columns = [name for name in NAMES if any(name in line for line in cells.values())]
    return grid(("card", "setting"), {name: NAMES[name] for name in columns}, cells)


def _latest(runs: list[dict[str, str]]) -> dict[str, str]:
    """The last that compares Hotloop with another library, or else with none."""

    def worth(number: int) -> tuple[bool, bool, int]:
        ours = [name for name in runs[number] if name.startswith("hotloop")]
        return bool(ours), len(runs[number]) > len(ours), number

    return runs[max(range(len(runs)), key=worth)]


def grid(
    heads: tuple[str, ...], columns: dict[str, str], cells: dict[tuple[str, ...], dict[str, str]]
) -> str:
    """Markdown: a line for each key of `cells`, whose parts stand under `heads`; a column for each of `columns`."""
    written = [
        f"| {' | '.join((*heads, *columns.values()))} |",
        "|---" * (len(heads) + len(columns)) + "|",
    ]
    for key, line in cells.items():
        measured = (line.get(name, "") for name in columns)
        written.append(f"| {' | '.join(key)} | {' | '.join(measured)} |")
    return "\n".join(written)


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
    attention = f" ({row['attention']})" if row.get("attention") else ""
    speed = f"{row['tok_s']:,}" if "tok_s" in row else "not timed"
    return f"{speed} / {row['peak_gib']:.1f} GiB{attention}"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page made of one file of op rows: what is a line of its table, and what stands in a cell."""

    title: str
    file: str
    rerun: str
    says: str
    key: Callable[[Row], str]
    cell: Callable[[Row], str]


def _share(row: Row) -> str:
    return f"{row['p50_ms']:.3g} ms, {100 * row['share_of_copy']:.0f}%"


def _head(row: Row) -> str:
    if "share_of_copy" in row:
        return _share(row)
    if "times_gemms" not in row:
        return f"{row['p50_ms']:.3g} ms"
    return f"{row['p50_ms']:.3g} ms, {row['times_gemms']:.2f}, {row['extra_bytes'] / 2**30:.2f} GiB"


def _batch(row: Row) -> str:
    s = row["shape"]
    parts = [f"{s['tokens']:,} tokens in {s['sequences']}, longest {s['longest']:,}"]
    parts.append(f"{s['heads']}/{s['kv_heads']} heads of {s['head_size']}")
    if s["window"]:
        parts.append(f"window {s['window']:,}")
    if s["softcap"] != "None":
        parts.append(f"cap {s['softcap']}")
    return f"{', '.join(parts)}, {row['mode']}"


def _tflops(row: Row) -> str:
    return f"{row['tflop_s']:.0f}"


SECTIONS = (
    Section(
        title="rms_norm, rope, glu",
        file="op_elementwise.jsonl",
        rerun="python benchmarks/run_ops.py elementwise",
        says="Time, and share of the rate at which the card copies, measured in the same run. The bytes are those that "
        "must move: every input read once, every output written once.",
        key=lambda r: f"{r['op']}, {r['shape']['model']}, {r['mode']}",
        cell=_share,
    ),
    Section(
        title="nf4",
        file="op_nf4.jsonl",
        rerun="python benchmarks/run_ops.py nf4",
        says="Time to dequantise one weight, and share of the copy rate.",
        key=lambda r: f"{r['shape']['name']}, {r['shape']['N']} x {r['shape']['K']}",
        cell=_share,
    ),
    Section(
        title="linear_cross_entropy",
        file="op_linear_cross_entropy.jsonl",
        rerun="python benchmarks/run_ops.py linear_cross_entropy",
        says="Time, times that of its GEMMs alone, and memory beyond the inputs and their gradients. `rows` is the "
        "kernel over a tile of logits, with its share of the copy rate.",
        key=lambda r: f"{r['shape']['name']}, {r['shape']['T']:,} tokens, {r['mode']}",
        cell=_head,
    ),
    Section(
        title="attention",
        file="op_attention.jsonl",
        rerun="python benchmarks/run_ops.py attention attention_gemma2",
        says="TFLOP/s, counting visible pairs only; backward counted as 2.5 times forward.",
        key=_batch,
        cell=_tflops,
    ),
)


def op_table(section: Section, rows: list[Row]) -> str:
    """A card's rows of one op."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    variants: dict[str, str] = {}
    for row in rows:
        cells.setdefault((section.key(row),), {})[row["variant"]] = section.cell(row)
        variants[row["variant"]] = row["variant"]
    return grid(("",), variants, cells)


def origin(rows: list[Row]) -> str:
    """The days, commits and versions that rows come from."""
    found: dict[str, None] = {}
    for row in rows:
        versions = row.get("versions", row)
        parts = [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
        found[f"{row['date']} at {row['commit']}, {', '.join(parts)}"] = None
    return "; ".join(found)


def curves(rows: list[Row]) -> str:
    """The last comparison of training curves: held-out losses, and how far frameworks and seeds lie apart."""
    newest = [row for row in rows if row["run"] == rows[-1]["run"]]
    cells = {
        (f"{NAMES[row['framework']]}, seed {row['seed']}",): {
            "first": f"{row['held_out'][0][1]:.4f}",
            "last": f"{row['held_out'][-1][1]:.4f}",
            "tail": f"{statistics.mean(row['loss'][-20:]):.4f}",
            "seconds": f"{row['seconds']:.0f}",
        }
        for row in newest
    }
    one = newest[0]
    columns = {
        "first": "held-out loss before",
        "last": f"after {one['steps']} steps",
        "tail": "training loss, last 20 steps",
        "seconds": "seconds",
    }
    return (
        f"{one['model']} on {one['text']}; {one['tokens_per_step']:,} tokens a step, r={one['rank']}, "
        f"{one['card']}; {origin(newest)}.\n\n{grid(('',), columns, cells)}"
    )


def page(history: Path = HISTORY.parent, docs: Path = PAGE.parent) -> str:
    """docs/results.md: what stands in the history, newest rows, and how to measure it again."""
    parts = [
        "# Results",
        "Made by `python benchmarks/results.py --page` of the rows in `benchmarks/history`; nothing here is typed. A "
        "script checks each op against truth before it times it. Every table names the command that measures it again; "
        "`--smoke` shows on any machine that the command runs. What was tried, predicted and missed is in "
        "[the log](../benchmarks/LOG.md).",
        "## A training step",
        "Tokens a second and peak memory of a QLoRA or LoRA step with 8-bit AdamW, each framework in a process of its "
        "own, one after the other on one card; all frameworks at once, one alone, and what fits a budget:",
        "```text\npython benchmarks/contest.py --run NAME --commit SHA --models llama3-8b,mistral-7b --out rows.jsonl\n"
        "python benchmarks/step.py make llama3-8b FOLDER\n"
        "python benchmarks/step.py run hotloop FOLDER --no-ckpt --settings 2x2048,8x2048\n"
        "python benchmarks/budget.py llama3-70b 2x2048@23 --run NAME --commit SHA --out rows.jsonl\n```",
    ]
    steps = read(history / "yardstick.jsonl")
    parts += [table(steps), f"Rows of {origin(steps)}." if steps else ""]
    for section in SECTIONS:
        rows = [row for row in lines(history / section.file) if not row.get("smoke")]
        parts += [f"## {section.title}", section.says, f"```sh\n{section.rerun}\n```"]
        if not rows:
            parts.append("No rows yet.")
        for card in dict.fromkeys(row["gpu"] for row in rows):
            own = [row for row in rows if row["gpu"] == card]
            parts += [f"{card}; {origin(own)}.", op_table(section, own)]
    parts += [
        "## A fine-tune beside eager's",
        "The same adapters and the same batches in the same order, from each seed; between the seeds both differ, "
        "which is the noise.",
        "```sh\npython benchmarks/smollm2_curve.py\n"
        f"python benchmarks/smollm2_curve.py --draw docs/{PICTURE}\npython benchmarks/results.py --page\n```",
    ]
    trained = lines(history / "curves.jsonl")
    parts.append(curves(trained) if trained else "No rows yet.")
    if trained and (docs / PICTURE).is_file():
        parts.append(f"![Loss and held-out loss by step]({PICTURE})")
    return "\n\n".join(filter(None, parts)) + "\n"


if __name__ == "__main__":
    if "--page" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(table(read(*map(Path, sys.argv[1:2]))))
