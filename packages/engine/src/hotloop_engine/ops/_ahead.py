"""How far ahead a kernel fetches that loops over rows and sums over them, such as a weight's gradient.

Such a kernel has few programs, since each leaves a partial sum behind, and each waits for a reduction in every row.
With its next rows on the way into shared memory (cp.async, which Triton makes of a loop with stages), the memory stays
busy.
"""

from __future__ import annotations

BYTES_AHEAD = 64 * 1024
"""Shared memory for rows on the way, of a program: less than the 99 KB that the smallest cards since Ampere offer."""


def stages_ahead(row_bytes: int) -> int:
    """Stages for a loop that reads `row_bytes` a turn: the row at hand and two, one or none on the way."""
    return 1 + min(2, BYTES_AHEAD // max(1, row_bytes))
