"""What a run came to, as a table for people, JSON for programs and a plot of the loss."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hotloop_core.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from .directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The end of a run. Losses are means over trained tokens, in nats; seconds are of training alone.

    peak_bytes: of device memory, None on CPU. idle: parameters whose gradient was zero in every step.
    utilisation: the share of the bins' places that held a token. tokens_dropped: of rows that were too long.
    processes: how many trained as one; peak_bytes is that of the first.
    exports: the files written after training. notes: what a user should know.
    """

    directory: str
    steps: int
    tokens: int
    seconds: float
    train_loss: float
    held_out_before: float | None
    held_out_after: float | None
    peak_bytes: int | None
    utilisation: float
    rows_per_bin: float
    tokens_dropped: int
    processes: int
    idle: list[str]
    exports: list[str]
    notes: list[str]

    def __str__(self) -> str:
        lines = [
            f"{self.steps:,} steps, {self.tokens:,} tokens in {self.seconds:.0f} s "
            f"({self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s); last loss {self.train_loss:.4f}"
        ]
        lines.append(
            f"bins {self.utilisation:.2%} full, {self.rows_per_bin:.1f} rows a bin, "
            f"{self.tokens_dropped:,} tokens dropped"
        )
        if self.held_out_before is not None and self.held_out_after is not None:
            lines.append(
                f"held-out loss {self.held_out_before:.4f} before, {self.held_out_after:.4f} after"
            )
        if self.peak_bytes is not None:
            lines.append(f"peak device memory {self.peak_bytes / 2**30:.2f} GiB")
        if self.idle:
            lines.append(
                f"{len(self.idle)} parameters never had a gradient: {', '.join(self.idle[:5])}"
            )
        lines += [f"wrote {path}" for path in self.exports]
        return "\n".join(lines + self.notes)

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")


def plot_loss(directory: RunDirectory) -> str | None:
    """Draws loss.png from metrics.jsonl. Returns why there is none, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no loss.png: matplotlib is not installed (`uv add 'hotloop[train]'`)"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = directory.read_metrics()
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _line(axes, rows, "loss", "training", marker="", alpha=0.8)
    _line(axes, rows, "eval_loss", "held out", marker="o", alpha=1.0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(directory.path.name)
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(directory.plot, image.getvalue())
    return None


def _line(
    axes: Any, rows: list[dict[str, Any]], key: str, label: str, *, marker: str, alpha: float
) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, marker=marker, alpha=alpha)
