"""Which attention backend runs, and a table of what each can do."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from hotloop_core.errors import ConfigError, NoImplementationError

from .backends import BACKENDS
from .interface import Backend, Request, names, require


@functools.cache
def choose(request: Request, device: torch.device, force: str | None = None) -> Backend:
    """The first backend, in measured order of speed, that can do what is asked, or the one forced.

    Raises:
        ConfigError: `force` names no backend.
        NoImplementationError: none can, or the forced one cannot; with each one's reason.

    """
    by_name = {backend.name: backend for backend in BACKENDS}
    if force is not None:
        if force not in by_name:
            raise ConfigError(
                f"no attention backend {force!r}; expected one of {', '.join(by_name)}."
            )
        require(by_name[force], request.in_any_shape, device)
        return by_name[force]
    reasons: list[str] = []
    for backend in BACKENDS:
        reason = backend.refusal(request, device)
        if reason is None and device.type in backend.capability.forced_on:
            reason = f"too slow to be chosen on {device.type}; name it to use it"
        if reason is None:
            return backend
        reasons.append(f"  {backend.name}: {reason}")
    raise NoImplementationError(
        f"no attention backend can do {request} on {device}:\n" + "\n".join(reasons)
    )


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """A backend, whether it runs on a device, and what it can do there; for `hotloop doctor`."""

    name: str
    available: bool
    reason: str
    dtypes: str
    head_sizes: str
    packed: bool
    window: bool
    softcap: bool
    deterministic: bool


def table(device: torch.device | str) -> list[BackendRow]:
    """Every backend in the order of choice, with the reason where it cannot run on this device."""
    device = torch.device(device)
    rows: list[BackendRow] = []
    for backend in BACKENDS:
        can = backend.capability
        reason = backend.missing(device)
        reason_shown = (
            "only if named: far slower"
            if reason is None and device.type in can.forced_on
            else reason or ""
        )
        smallest, largest, multiple = can.head_sizes
        rows.append(
            BackendRow(
                name=backend.name,
                available=reason is None,
                reason=reason_shown,
                dtypes=names(can.dtypes),
                head_sizes=f"{smallest}-{largest}, step {multiple}",
                packed=can.packed,
                window=can.window,
                softcap=can.softcap,
                deterministic=can.deterministic,
            )
        )
    return rows
