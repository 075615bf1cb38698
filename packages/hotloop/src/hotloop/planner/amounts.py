"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from hotloop_core.errors import ConfigError

from .read import whole

MOST_BYTES = 2**58
"""Beyond it sums of bytes would leave 64 bits."""


def parse_bytes(size: str | int, *, least: int = 1) -> int:
    """Bytes of "24GiB", "24GB", "24 G" (GiB) or a number of bytes, `least` at least.

    Raises:
        ConfigError: not a size, less, or more than 256 PiB; or, as text, a number of bytes so small
            that its unit was forgotten.

    """
    found = int(size) if whole(size) else _bytes_of(str(size))
    if found is None or not least <= found <= MOST_BYTES:
        raise ConfigError(
            f"{size!r} is not an amount of memory; expected such as '24GiB', '24GB' or a number of "
            "bytes, 256 PiB at most"
        )
    return found


def _bytes_of(text: str) -> int | None:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?B)?)?\s*", text, re.IGNORECASE)
    if match is None:
        return None
    number, unit = float(match[1]), match[2]
    if unit is None:
        return int(match[1]) if match[1].isdigit() and not 0 < number < 2**20 else None
    base = 1000 if (match[3] or "").lower() == "b" else 1024
    return int(min(number * base ** ("KMGT".index(unit.upper()) + 1), 2 * MOST_BYTES))
