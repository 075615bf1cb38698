"""What the time of a step goes into."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotloop_core.plan import amount

if TYPE_CHECKING:
    from .space import Found


OFFERED = 0.03
"""Of a step: how much faster weights that stay dequantised must make it to be offered."""


RECORDED_MS = (0.6, 0.4)
"""Forward and backward of a layer that is recorded as CUDA graphs: it is read and checked, and launched at once."""


def step_parts(found: Found, dequantised: int = 0, *, recorded: bool = False) -> dict[str, float]:
    """Milliseconds of a step by part; what is hidden behind another part is not counted.

    dequantised: layers whose weights stay so. recorded: layers are recorded as CUDA graphs.
    """
    space = found.space
    times, layers = space.times, space.layers
    ready = dequantised / layers
    parts = {name: layers * (times.forward[name] + times.backward[name]) for name in times.forward}
    parts["copies of weights"] *= 1 - ready
    copied = [times.forward["copies of weights"], times.backward["copies of weights"]]
    run_layers = [found.count, found.count, layers - found.count, layers - found.count]
    runs = [
        run._replace(device=run.device - ready * count * ms)
        for run, count, ms in zip(found.passes(), run_layers, 2 * copied, strict=True)
    ]
    if recorded:
        runs = [
            run._replace(launches=count * ms)
            for run, count, ms in zip(runs, run_layers, 2 * RECORDED_MS, strict=True)
        ]
    device = float(sum(run.device for run in runs))
    moved = sum(float(b) for b in (found.bytes().away, found.bytes().host_weights))
    parts["traffic to and from the host"] = 2 * moved * times.copy
    parts["recomputation"] = device - sum(parts.values())
    bound = sum(float(max(run.device, run.launches)) for run in runs)
    parts["waiting for kernel launches"] = bound - device
    parts["waiting for the host link"] = float(sum(run.total for run in runs)) - bound
    parts |= times.outside
    parts["embedding from the host"] = times.embedding * space.homes.embedding
    return {name: ms for name, ms in parts.items() if ms > 1e-6}


def offer_of(ready: int, found: Found) -> list[str]:
    """What weights that stay dequantised would bring, where that is much."""
    before, after = (sum(step_parts(found, n).values()) for n in (0, ready))
    faster = 1 - after / before
    if faster < OFFERED:
        return []
    size = amount(ready * found.space.job.layer_dequantised)
    return [f"dequantised=True, or a budget (vram=), makes it {faster:.0%} faster with {size} more"]
