"""Finds plugins, one entry point at a time, so that a broken one only fails the work that needs it."""

from __future__ import annotations

import difflib
import importlib.metadata as metadata
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

from .errors import (
    AmbiguousFamilyError,
    BrokenPluginError,
    ConfigError,
    NoExporterError,
    NoFamilyError,
    PluginError,
    SpecVersionError,
)
from .exporter import ExporterSpec
from .family import API, Config, FamilySpec
from .hooks import GROUP, HOOK_NAMES, Hooks, OpSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

ACCEPTED = (API, API - 1) if API > 1 else (API,)
_TYPES = {"FamilySpec": FamilySpec, "ExporterSpec": ExporterSpec, "OpSpec": OpSpec}


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One entry point: what it brings, or why it does not (`problem`: one line; `trace`: the whole traceback)."""

    name: str
    distribution: str
    version: str
    families: tuple[FamilySpec, ...] = ()
    exporters: tuple[ExporterSpec, ...] = ()
    ops: tuple[OpSpec, ...] = ()
    blocked: bool = False
    problem: str | None = None
    trace: str | None = None


@dataclass(frozen=True)
class Registry:
    """What is installed. Read-only; `discover()` makes one."""

    plugins: tuple[Plugin, ...] = field(default=())

    @property
    def families(self) -> tuple[FamilySpec, ...]:
        """Every family of every plugin that loaded."""
        return tuple(f for p in self.plugins for f in p.families)

    @property
    def exporters(self) -> tuple[ExporterSpec, ...]:
        """Every exporter of every plugin that loaded."""
        return tuple(e for p in self.plugins for e in p.exporters)

    @property
    def ops(self) -> tuple[OpSpec, ...]:
        """Every op implementation of every plugin that loaded."""
        return tuple(o for p in self.plugins for o in p.ops)

    def match(self, config: Config, *, family: str | None = None) -> FamilySpec:
        """The family of a config, by its `model_type`; `family` chooses by name where several claim it.

        Raises:
            NoFamilyError: nothing installed handles it. AmbiguousFamilyError: several do.

        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise ConfigError(
                f"config.json has model_type={model_type!r}, expected a name such as 'llama'"
            )
        claims = [(p, f) for p in self.plugins for f in p.families if model_type in f.model_types]
        if family is not None:
            claims = [(p, f) for p, f in claims if f.name == family]
            if not claims:
                raise NoFamilyError(
                    f"no installed family named {family!r} handles model_type={model_type!r}. "
                    f"{self._installed_families()}"
                )
        if not claims:
            raise NoFamilyError(self._no_family(model_type))
        if len(claims) > 1:
            names = ", ".join(f"{f.name!r} ({p.distribution} {p.version})" for p, f in claims)
            by_name = len({f.name for _, f in claims}) == len(claims)
            choose = "Choose with family=NAME (--family NAME), or block" if by_name else "Block"
            raise AmbiguousFamilyError(
                f"model_type={model_type!r} is claimed by {names}. {choose} one of the plugins "
                "(block=[NAME], --block NAME)."
            )
        return claims[0][1]

    def exporter(self, name: str) -> ExporterSpec:
        """The exporter of a format.

        Raises:
            NoExporterError: none is installed, or two plugins claim the format.

        """
        claims = [(p, e) for p in self.plugins for e in p.exporters if e.name == name]
        if len(claims) > 1:
            who = ", ".join(f"{p.distribution} {p.version}" for p, _ in claims)
            raise NoExporterError(f"format {name!r} is claimed by {who}; block one of the plugins.")
        if not claims:
            self._raise_if_broken(name)
            have = ", ".join(sorted(e.name for e in self.exporters)) or "none"
            raise NoExporterError(
                f"no installed plugin writes {name!r}. Installed formats: {have}. Install one "
                f"(`uv add hotloop-{name}`) or write one: docs/write-an-exporter.md"
            )
        return claims[0][1]

    def _no_family(self, model_type: str) -> str:
        broken = [p for p in self.plugins if p.problem]
        lines = [
            f"no installed plugin handles model_type={model_type!r}. {self._installed_families()}"
        ]
        lines += [f"Plugin {p.name!r} ({p.distribution}) is broken: {p.problem}" for p in broken]
        known = KNOWN_DISTRIBUTIONS.get(model_type)
        lines.append(
            f"Install it: `uv add {known}`."
            if known
            else f"Install one that does, or write one: `hotloop new-family {model_type}` drafts it, "
            "docs/write-a-family.md says how."
        )
        return "\n".join(lines)

    def _installed_families(self) -> str:
        return f"Installed: {', '.join(sorted(f.name for f in self.families)) or 'none'}."

    def _raise_if_broken(self, name: str) -> None:
        for plugin in self.plugins:
            if plugin.name == name and plugin.problem:
                raise BrokenPluginError(
                    f"plugin {name!r} ({plugin.distribution} {plugin.version}) is installed but "
                    f"broken: {plugin.problem}\n{plugin.trace or ''}"
                )


KNOWN_DISTRIBUTIONS: Mapping[str, str] = {
    "llama": "hotloop-llama",
    "mistral": "hotloop-mistral",
    "ministral": "hotloop-mistral",
    "gemma": "hotloop-gemma",
    "gemma2": "hotloop-gemma",
    "gemma3_text": "hotloop-gemma",
    "glm": "hotloop-glm",
    "glm4": "hotloop-glm",
    "granite": "hotloop-granite",
    "olmo2": "hotloop-olmo",
    "olmo3": "hotloop-olmo",
    "phi3": "hotloop-phi",
    "qwen2": "hotloop-qwen",
    "qwen3": "hotloop-qwen",
    "smollm3": "hotloop-smollm",
    "stablelm": "hotloop-stablelm",
    "exaone4": "hotloop-exaone",
}
"""model_type -> the distribution of this project that handles it, for the error that says what to install."""


def discover(
    *,
    block: Iterable[str] = (),
    entry_points: Callable[[], Iterable[metadata.EntryPoint]] | None = None,
) -> Registry:
    """Loads every entry point of the group, each on its own; a blocked one is listed but not loaded."""
    found = metadata.entry_points(group=GROUP) if entry_points is None else entry_points()
    blocked = set(block)
    points = sorted(found, key=lambda point: point.name)
    unknown = blocked - {p.name for p in points}
    if unknown:
        have = ", ".join(p.name for p in points) or "none"
        raise PluginError(
            f"cannot block {', '.join(sorted(unknown))}: installed plugins are {have}"
        )
    return Registry(tuple(_load(point, point.name in blocked) for point in points))


def _load(point: metadata.EntryPoint, blocked: bool) -> Plugin:
    distribution = point.dist.name if point.dist else "?"
    version = point.dist.version if point.dist else "?"
    who: dict[str, Any] = {"name": point.name, "distribution": distribution, "version": version}
    if blocked:
        return Plugin(**who, blocked=True)
    try:
        specs = collect(point.load(), name=point.name, distribution=distribution)
    # Whatever a foreign plugin raises is listed, never lost; sys.exit() would end every command.
    except (Exception, SystemExit) as error:
        return Plugin(
            **who, problem=f"{type(error).__name__}: {error}", trace=traceback.format_exc()
        )
    return Plugin(
        **who,
        families=tuple(specs["hotloop_families"]),
        exporters=tuple(specs["hotloop_exporters"]),
        ops=tuple(specs["hotloop_ops"]),
    )


def collect(plugin: object, *, name: str, distribution: str = "?") -> dict[str, list[Any]]:
    """Calls the hooks of one plugin and checks what they return.

    Raises:
        PluginError: a misspelt hook, or a hook that returned something else than it says.
        SpecVersionError: a spec of a version that this core does not accept.

    """
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Hooks)
    for attribute in dir(plugin):
        if attribute.startswith(f"{GROUP}_") and attribute not in HOOK_NAMES:
            near = difflib.get_close_matches(attribute, HOOK_NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PluginError(
                f"plugin {name!r} has {attribute!r}, which is no hook{hint} "
                f"The hooks are {', '.join(HOOK_NAMES)}."
            )
    try:
        manager.register(plugin, name=name)
    except pluggy.PluginValidationError as error:
        reason = str(error).splitlines()[-1]
        raise PluginError(f"plugin {name!r}: a hook takes no argument. {reason}") from error
    implemented = {caller.name for caller in manager.get_hookcallers(plugin) or []}
    unmarked = [hook for hook in HOOK_NAMES if hasattr(plugin, hook) and hook not in implemented]
    if unmarked:
        raise PluginError(
            f"plugin {name!r}: {unmarked[0]} is not marked; put @hookimpl of hotloop_core above it"
        )
    if not implemented:
        raise PluginError(
            f"plugin {name!r} implements no hook; expected at least one of {', '.join(HOOK_NAMES)}"
        )
    found: dict[str, list[Any]] = {}
    for hook, kind in HOOK_NAMES.items():
        results = getattr(manager.hook, hook)()
        if hook in implemented and not results:  # pluggy drops None
            raise PluginError(f"plugin {name!r}: {hook} returned None, expected a list of {kind}")
        found[hook] = _checked(hook, kind, results, name, distribution)
    return found


def _checked(hook: str, kind: str, results: list[Any], name: str, distribution: str) -> list[Any]:
    specs: list[Any] = []
    for result in results:
        if not isinstance(result, list):
            raise PluginError(
                f"plugin {name!r}: {hook} returned {type(result).__name__}, expected a list of {kind}"
            )
        specs.extend(result)  # pyright: ignore[reportUnknownArgumentType]
    for spec in specs:
        given = spec  # whose fields may be of any type, whatever their class declares
        if not isinstance(spec, _TYPES[kind]):
            raise PluginError(
                f"plugin {name!r}: {hook} returned a {type(spec).__name__}, expected {kind}"
            )
        if not isinstance(given.api, int):
            raise PluginError(
                f"plugin {name!r}: api is {given.api!r}, expected hotloop_core.API as it was when the "
                "plugin was written, a whole number"
            )
        if spec.api not in ACCEPTED:
            newer = spec.api > API
            upgrade = "hotloop-core" if newer else distribution
            raise SpecVersionError(
                f"plugin {name!r} ({distribution}) is written for api {spec.api}; this hotloop-core "
                f"accepts {' and '.join(map(str, ACCEPTED))}. Upgrade: `uv add --upgrade {upgrade}`."
            )
        if isinstance(spec, FamilySpec) and not isinstance(given.model_types, frozenset):
            raise PluginError(
                f"plugin {name!r}: model_types of {spec.name!r} is {given.model_types!r}, expected a "
                "frozenset of names"
            )
    return specs
