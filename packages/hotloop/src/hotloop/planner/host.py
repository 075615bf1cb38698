"""Host memory that a plan may pin."""

from __future__ import annotations

from pathlib import Path

GIB = 2**30

HOST_SHARE = 0.8
"""Of the host's free memory: the rest is left to the loader, the page cache and other programs."""

_CGROUP = Path("/sys/fs/cgroup")


def free_host_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that this process may still take: what is free, and no more than its container grants."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used, files = (
        _number(cgroup / "memory.max"),
        _number(cgroup / "memory.current"),
        _inactive_files(cgroup / "memory.stat"),
    )
    if limit is None or used is None:
        return free
    return max(0, min(free, limit - used + files))


def assumed_host_memory(card_memory: int) -> int:
    """Bytes of a host that is not at hand: 64 GiB, or twice the card's memory where that is more."""
    return max(64 * GIB, 2 * card_memory)


def _number(file: Path) -> int | None:
    """The number in a cgroup's file; None where there is no such file, or no limit ("max")."""
    if not file.is_file():
        return None
    text = file.read_text(encoding="ascii").strip()
    return int(text) if text.isdigit() else None


def _inactive_files(file: Path) -> int:
    """Bytes of page cache that the container gives up before it refuses memory."""
    if not file.is_file():
        return 0
    for line in file.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def host_limit(*, again: bool) -> int:
    """Bytes that may be pinned here. again: for a model whose weights have their homes; what this process has pinned
    is not free, and is used again.
    """
    return int(HOST_SHARE * free_host_memory()) + (_pinned() if again else 0)


def _pinned() -> int:
    """Bytes that this process has page-locked."""
    from hotloop_engine.stores import pinned_bytes

    return pinned_bytes()
