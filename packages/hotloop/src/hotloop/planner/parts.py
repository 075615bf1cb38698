"""What the time of a step goes into."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .space import Found


def step_parts(found: Found, dequantised: int = 0) -> dict[str, float]:
    """Milliseconds of a step by part; what is hidden behind another part is not counted.

    dequantised: layers whose weights stay so.
    """
    space = found.space
    times, runs = space.times, found.passes()
    layers = space.layers
    parts = {name: layers * (times.forward[name] + times.backward[name]) for name in times.forward}
    device = float(sum(run.device for run in runs))
    moved = sum(float(b) for b in (found.bytes().away, found.bytes().host_weights))
    parts["traffic to and from the host"] = 2 * moved * times.copy
    parts["recomputation"] = device - sum(parts.values())
    bound = sum(float(max(run.device, run.launches)) for run in runs)
    parts["waiting for kernel launches"] = bound - device
    parts["waiting for the host link"] = float(sum(run.total for run in runs)) - bound
    parts["copies of weights"] *= 1 - dequantised / layers
    parts |= times.outside
    parts["embedding from the host"] = times.embedding * space.homes.embedding
    return {name: ms for name, ms in parts.items() if ms > 1e-6}
