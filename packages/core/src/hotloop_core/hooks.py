"""The hooks that a plugin implements. Each takes nothing, returns data and imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .exporter import ExporterSpec
    from .family import FamilySpec

GROUP = "hotloop"
"""The entry point group and the pluggy project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """An implementation of an op, or an attention backend, that a plugin brings.

    op: the op's name ("rms_norm", ...), a Protocol of `hotloop_core.kernels`. name: what a user asks for.
    target: "package.module:object" (or "package.module"), imported when first used. devices: device types it runs on.
    """

    api: int
    op: str
    name: str
    target: str
    devices: frozenset[str]


class Hooks(Protocol):
    """The hook specifications; a plugin implements any of them with `@hookimpl`."""

    @hookspec
    def hotloop_families(self) -> list[FamilySpec]:
        """The model families that this plugin describes."""
        ...

    @hookspec
    def hotloop_exporters(self) -> list[ExporterSpec]:
        """The export formats that this plugin writes."""
        ...

    @hookspec
    def hotloop_ops(self) -> list[OpSpec]:
        """The op implementations that this plugin brings."""
        ...


HOOK_NAMES: Mapping[str, str] = {
    "hotloop_families": "FamilySpec",
    "hotloop_exporters": "ExporterSpec",
    "hotloop_ops": "OpSpec",
}
"""Hook name -> the type of what its list holds."""
