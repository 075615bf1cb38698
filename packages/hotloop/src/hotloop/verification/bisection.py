"""Turns ops off one at a time and names the one that moves the error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_engine.ops._select import ENGINE_OPS

from .compare import Question, Standard, wired_run
from .report import TOTAL, Bisection, Row, Trial

if TYPE_CHECKING:
    from hotloop.wiring import Receipt

MOVES = 0.9
"""An op moves the error if without it the worst ratio falls below this share of what it was."""


def bisect_ops(
    ask: Question, receipt: Receipt, standard: Standard, rows: tuple[Row, ...]
) -> Bisection:
    """Runs the wired model once for each op with its torch reference, and once with reference attention.

    rows: what it gave with every op on.
    """
    norm = receipt.family.layer_spec(receipt.shared.facts.config, 0).norms.kind
    unused = {"layer_norm" if norm == "rms" else "rms_norm"}
    trials: list[Trial] = []
    for op in (*(op for op in ENGINE_OPS if op not in unused), "attention"):
        if op == "attention":
            found = wired_run(ask, receipt, attention="reference")
        else:
            found = wired_run(ask, receipt, ops={op: "reference"})
        by_name = {row.name: row for row in standard.rows(found)}
        worst = max(row.ratio for row in by_name.values())
        trials.append(Trial(op=op, worst=worst, total=by_name[TOTAL].ours))
    trials.sort(key=lambda trial: trial.worst)
    moved = trials[0].worst < MOVES * rows[0].ratio
    return Bisection(trials=tuple(trials), culprit=trials[0].op if moved else None)
