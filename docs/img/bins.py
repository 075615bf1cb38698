"""Draws bins.png, the worked example of the page "Packing": python docs/img/bins.py

10,000 rows, 60% under 256 tokens, 40% up to 1,024, in bins of 2,048.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hotloop.training.picture import draw_bins
from hotloop_core.packing import pack


def lengths(rows: int = 10_000) -> np.ndarray:
    """Tokens of each row, in random order."""
    random = np.random.default_rng(0)
    short = rows * 6 // 10
    drawn = [random.integers(1, 256, short), random.integers(1, 1025, rows - short)]
    return random.permutation(np.concatenate(drawn))


if __name__ == "__main__":
    packing = pack(lengths(), 2048)
    print(packing)
    draw_bins(packing, Path(__file__).with_name("bins.png"))
