"""Sphinx configuration. Docstrings are plain text with Google sections, so they are made safe for reST on the way."""

from __future__ import annotations

import re
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "Hotloop"
release = version = metadata.version("hotloop")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files outside docs/, which a test checks
html_theme = "pydata_sphinx_theme"
html_title = "Hotloop"
html_show_copyright = False
html_theme_options = {"navigation_with_keys": False, "show_prev_next": False}
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_use_ivar = True

_SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")
_FIELD = re.compile(r"([a-z]\w*(?:, \w+)*): +(?=\S)")


def plain_text(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Makes reST of a plain docstring, up to its first Google section, which is napoleon's.

    A line `name: what it is` becomes an item of a list, an indented block a literal one, and what reST would take for
    markup is escaped outside backticks.
    """
    result: list[str] = []
    section = literal = item = False
    for number, line in enumerate(lines):
        blank_before = number == 0 or not lines[number - 1].strip()
        section = section or bool(_SECTION.match(line))
        if section or not line.strip():
            item = item and bool(line.strip())
            result.append(line if not section else _escaped(line))
            continue
        indented = line.startswith("    ")
        if literal and indented:
            result.append(line)
            continue
        literal = indented and blank_before
        if literal:
            result += ["::", "", line]
            continue
        field = _FIELD.match(line)
        if field:
            result += [
                *([] if item or blank_before else [""]),
                f"- **{field[1]}**: {_escaped(line[field.end() :])}",
            ]
            item = True
        elif line.startswith("- "):
            result.append(_escaped(line))
            item = True
        else:
            result.append(("  " if item else "") + _escaped(line.strip()))
    lines[:] = result


def _escaped(line: str) -> str:
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*|]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def setup(app: Sphinx) -> None:
    """Runs before napoleon, which listens to the same event at the default priority."""
    app.connect("autodoc-process-docstring", plain_text, priority=400)
