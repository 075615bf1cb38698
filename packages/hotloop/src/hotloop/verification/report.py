"""What a verification found: errors against truth, wired and eager, the worst first."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Group

LOSS = "loss"
TOTAL = "all gradients"
"""The names of the rows that compare the loss, and the whole gradient as one vector."""
SHOWN = 12
"""Rows that the printed table has; the report and its JSON have all."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compared quantity. Errors are ||value - truth|| / ||truth||; infinite where missing or not finite."""

    name: str
    ours: float
    eager: float
    allowed: float

    @property
    def ratio(self) -> float:
        """ours / allowed: above 1 is worse than eager."""
        return self.ours / self.allowed if math.isfinite(self.ours) else math.inf

    @property
    def ok(self) -> bool:
        """Whether ours is within what is allowed."""
        return self.ours <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run with one op replaced by its torch reference: the worst ratio and the error of the whole gradient then."""

    op: str
    worst: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """What turning ops off one at a time did, the most helpful first. culprit: the op that moves the error, or None."""

    trials: tuple[Trial, ...]
    culprit: str | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of `verify`, complete.

    rows: "loss", each trained parameter, each kind of parameter over all layers ("model.layers.*.mlp.up_proj.weight"),
    each layer ("model.layers.3") and the whole gradient ("all gradients"), worst first. losses: "ours",
    "eager", "truth". dtype, truth_dtype: by torch name ("bfloat16"). tokens: in the batch. notes: what a reader must
    know of how it was measured.
    """

    rows: tuple[Row, ...]
    losses: Mapping[str, float]
    dtype: str
    truth_dtype: str
    slack: float
    tokens: int
    notes: tuple[str, ...] = ()
    bisection: Bisection | None = None

    @property
    def worse(self) -> tuple[Row, ...]:
        """The rows that are worse than eager."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def ok(self) -> bool:
        """Whether loss and every gradient are no worse than eager's."""
        return not self.worse

    @property
    def exit_code(self) -> int:
        """0, or 1 if anything is worse."""
        return 0 if self.ok else 1

    def row(self, name: str) -> Row:
        """The row of one parameter, of "loss" or of "all gradients"."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None stands for what is not finite."""
        found: dict[str, Any] = {
            "ok": self.ok,
            "dtype": self.dtype,
            "truth_dtype": self.truth_dtype,
            "slack": self.slack,
            "tokens": self.tokens,
            "loss": {name: _finite(value) for name, value in self.losses.items()},
            "rows": [
                {
                    "name": row.name,
                    "ours": _finite(row.ours),
                    "eager": _finite(row.eager),
                    "allowed": _finite(row.allowed),
                    "ok": row.ok,
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
        }
        if self.bisection is not None:
            found["bisection"] = {
                "culprit": self.bisection.culprit,
                "trials": [
                    {"op": t.op, "worst": _finite(t.worst), "total": _finite(t.total)}
                    for t in self.bisection.trials
                ],
            }
        return found

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"Error against {self.truth_dtype} truth, {self.dtype}, worst first")
        table.add_column("what", overflow="fold")
        for column in ("ours", "eager", "allowed"):
            table.add_column(column, justify="right")
        table.add_column("")
        for row in self.rows[:SHOWN]:
            verdict = Text("ok", "green") if row.ok else Text("worse", "bold red")
            errors = (f"{value:.2e}" for value in (row.ours, row.eager, row.allowed))
            table.add_row(Text(row.name), *errors, verdict)
        left = len(self.rows) - SHOWN
        lines = [f"and {left} more, none of them worse than these"] if left > 0 else []
        lines += [
            "loss: " + ", ".join(f"{name} {value:.6f}" for name, value in self.losses.items()),
            self._verdict(),
            *self._bisection_lines(),
            *(f"note: {note}" for note in self.notes),
        ]
        return Group(table, *(Text(line) for line in lines))

    def _verdict(self) -> str:
        compared = len(self.rows)
        if self.ok:
            return f"no worse than eager: all {compared} within what is allowed (slack {self.slack:.0%})"
        return (
            f"worse than eager: {len(self.worse)} of {compared}. Turn the named op off "
            '(wire(model, ops={"NAME": "reference"})) and report it; `--bisect` finds which.'
        )

    def _bisection_lines(self) -> list[str]:
        if self.bisection is None:
            return []
        lines = [
            f"without {t.op}: worst {t.worst:.2f} of what is allowed, whole gradient {t.total:.2e}"
            for t in self.bisection.trials
        ]
        culprit = self.bisection.culprit
        moved = "no single op moves the error" if culprit is None else f"{culprit} moves the error"
        return [*lines, moved]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
