"""Imports what a plugin names as "package.module" or "package.module:object"."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import Any

from hotloop_core.errors import PluginError


@cache
def load_target(target: str) -> Any:
    """The module or object.

    Raises:
        PluginError: it cannot be imported, or the module has no such object.
    """
    module, _, attribute = target.partition(":")
    try:
        found = import_module(module)
        return attrgetter(attribute)(found) if attribute else found
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"a plugin names {target!r}, which cannot be imported: {error}. Install or upgrade the distribution that "
            "brings it, and what that needs."
        ) from error
