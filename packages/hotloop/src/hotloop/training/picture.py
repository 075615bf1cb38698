"""A picture of the same rows padded in batches and packed in bins."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any

from hotloop_core.errors import ConfigError
from hotloop_core.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hotloop_core.packing import Packing

COLOURS = [f"C{number}" for number in range(10) if number != 7]
"""matplotlib's cycle without its grey, which is padding here; a row has the same on both sides."""

SHOWN = 14
"""Bins in the picture: enough to see a pattern, few enough to see a row."""


def padded_utilisation(lengths: Sequence[int], rows: int) -> float:
    """The share of places that hold a token where `rows` rows at a time are padded to their longest."""
    batches = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    places = sum(max(batch) * len(batch) for batch in batches)
    return sum(lengths) / places if places else 1.0


def draw_bins(packing: Packing, path: Path) -> None:
    """Draws the first bins as PNG, and beside them the rows in them padded, as many to a batch as lie in a bin.

    The shares in the titles are those of all rows.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.

    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "a picture needs matplotlib, which is not installed: uv add 'hotloop[train]'"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bins = [
        [(piece.row, piece.stop - piece.start) for piece in packing[index]]
        for index in range(min(SHOWN, len(packing)))
    ]
    rows = max(1, round(packing.rows_per_bin))
    everything = sorted(
        zip(packing.rows.tolist(), (packing.stops - packing.starts).tolist(), strict=True)
    )
    before = padded_utilisation([size for _, size in everything], rows)
    figure = Figure(figsize=(9, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    padded, packed = figure.subplots(1, 2, sharey=True)
    _draw_padded(padded, sorted(row for bin in bins for row in bin), rows, len(bins))
    for place, bin in enumerate(bins):
        _draw_bar(packed, place, 0.9, bin, packing.capacity)
    padded.set_title(f"padded, {rows} rows to a batch: {before:.0%} tokens", fontsize=10)
    packed.set_title(
        f"packed in bins of {packing.capacity:,}: {packing.utilisation:.1%} tokens", fontsize=10
    )
    for axes in (padded, packed):
        axes.set_xlabel("tokens (grey: padding)")
        axes.set_yticks([])
        axes.set_xlim(0, packing.capacity)
    padded.invert_yaxis()
    padded.set_ylabel("batches, from the top")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    try:
        write_atomically(path, image.getvalue())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file") from error


def _draw_padded(axes: Any, pieces: list[tuple[int, int]], rows: int, height: int) -> None:
    thickness = height / len(pieces)
    for at in range(0, len(pieces), rows):
        batch = pieces[at : at + rows]
        longest = max(size for _, size in batch)
        for number, piece in enumerate(batch, start=at):
            _draw_bar(
                axes, number * thickness - 0.5, 0.9 * thickness, [piece], longest, align="edge"
            )


def _draw_bar(
    axes: Any,
    place: float,
    height: float,
    pieces: list[tuple[int, int]],
    width: int,
    *,
    align: str = "center",
) -> None:
    axes.barh(place, width, height, color="0.85", align=align)
    start = 0
    for row, size in pieces:
        axes.barh(
            place,
            size,
            height,
            left=start,
            color=COLOURS[row % len(COLOURS)],
            edgecolor="white",
            linewidth=0.3,
            align=align,
        )
        start += size
