"""What transformers takes for a key that a config.json lacks, where the description would take another value."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from hotloop_core import ConfigKeys, facts_of
from hotloop_core.errors import HotloopError

if TYPE_CHECKING:
    from hotloop_core import FamilySpec

    from .tiny import Tiny

PATTERNS = range(2, 9)
"""Numbers n to try where every n-th layer sees everything."""
ROPE = "rope_parameters"
"""How heads turn; every description reads it. Files from before this key was there say it by keys of their own."""


def fill_absent(family: FamilySpec, small: Tiny) -> tuple[FamilySpec, tuple[str, ...]]:
    """The description with `defaults` and `window_pattern`, and notes on keys that neither can say.

    A key that core refuses to miss, such as the hidden size, needs no default.
    """
    notes: list[str] = []
    for key in keys_read(family):
        if reads_alike(family, small, key):
            continue
        found = next(
            (each for each in _filled(family, small, key) if reads_alike(each, small, key)), None
        )
        if found is None:
            notes.append(
                f"a config.json without {key!r} is read otherwise than transformers reads it"
            )
        else:
            family = found
    return family, tuple(notes)


def keys_read(family: FamilySpec) -> list[str]:
    """The keys of the config that the description reads."""
    values = (getattr(family.keys, each.name) for each in fields(ConfigKeys))
    return [*(value for value in values if isinstance(value, str)), ROPE]


def reads_alike(family: FamilySpec, small: Tiny, key: str) -> bool:
    """Whether facts are the same with a key as transformers fills it and without it, at small sizes and its own."""
    arguments = {name: value for name, value in small.arguments.items() if name != key}
    for each in (arguments, {}):
        try:
            whole = small.config_class(**each).to_dict()
        except Exception:  # the config's class misses the key itself
            continue
        missing = {name: value for name, value in whole.items() if name != key}
        try:
            with_it, without = (facts_of(family, config) for config in (whole, missing))
        except HotloopError:  # core misses it, or the type's own defaults make no model
            continue
        if replace(with_it, config={}) != replace(without, config={}):
            return False
    return True


def _filled(family: FamilySpec, small: Tiny, key: str) -> list[FamilySpec]:
    """Descriptions that say what the key is where it is not there."""
    keys = family.keys
    if key == keys.layer_types:
        return [replace(family, keys=replace(keys, window_pattern=n)) for n in PATTERNS]
    defaults = {**keys.defaults, **taken(small, key)}
    return [replace(family, keys=replace(keys, defaults=defaults))]


def taken(small: Tiny, key: str) -> dict[str, Any]:
    """What transformers takes for a key that is not there, as `ConfigKeys.defaults` says it.

    Of a rotation by its older keys: a file that has one of them keeps it.
    """
    value: Any = small.config_class().to_dict().get(key)
    if key != ROPE:
        return {key: value}
    local = value.get("sliding_attention")
    rope = value.get("full_attention", value)
    keys = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {k: v for k, v in rope.items() if k not in keys}
    return keys if local is None else {**keys, "rope_local_base_freq": local["rope_theta"]}
