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

_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Law)s?:$")


def plain_text(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Escapes what reST would take for markup, outside backticks; an indented formula becomes a literal block."""
    literal = False
    result: list[str] = []
    for number, line in enumerate(lines):
        indented = line.startswith("    ")
        after_blank = number > 0 and not lines[number - 1].strip()
        inside = any(_SECTION.match(above) for above in _open_headings(lines[:number]))
        if indented and after_blank and not inside and not literal:
            result += ["::", ""]
            literal = True
        elif line.strip() and not indented:
            literal = False
        result.append(line if literal else _escaped(line))
    lines[:] = result


def _open_headings(lines: list[str]) -> list[str]:
    """The last line that begins at the margin."""
    return [line for line in lines if line.strip() and not line.startswith(" ")][-1:]


def _escaped(line: str) -> str:
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*|]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def setup(app: Sphinx) -> None:
    """Runs before napoleon, which listens to the same event at the default priority."""
    app.connect("autodoc-process-docstring", plain_text, priority=400)
