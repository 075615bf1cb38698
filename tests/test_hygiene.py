"""Habits that a machine can watch: file sizes, unfinished work, catch-alls, swallowed errors."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("packages", "plugins", "tests", "docs", "benchmarks", "examples")
SUFFIXES = {".py", ".md", ".toml", ".yaml", ".sh"}
FILES = sorted(
    file
    for room in ROOMS
    for file in (ROOT / room).rglob("*")
    if file.suffix in SUFFIXES and not {"_build", "__pycache__"} & set(file.parts)
)
LIBRARY = [f for f in FILES if "src" in f.relative_to(ROOT).parts and f.suffix == ".py"]
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
FOREIGN_SIGNATURES = {"forward", "__call__", "call", "__torch_function__", "__torch_dispatch__"}
"""Functions that stand where somebody else's did, and pass on whatever it was called with."""
BROAD = {"Exception", "BaseException", "ImportError"}


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_no_file_is_longer_than_its_ceiling() -> None:
    """400 lines, and 700 for a kernel: files decay by growing."""
    lengths = {named(file): len(file.read_text().splitlines()) for file in FILES}
    assert {
        n: k for n, k in lengths.items() if k > (700 if n.endswith("/kernel.py") else 400)
    } == {}


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{named(file)}:{number}"
        for file in FILES
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    assert found == []


def test_no_error_is_swallowed() -> None:
    """`except Exception: pass`, `suppress(ImportError)` and their kin are silent fallbacks."""
    assert list(_swallowed()) == []


def test_public_functions_take_no_catch_all_unless_they_refuse_by_name() -> None:
    """`**others` goes to `refuse`; untyped ones only where a foreign signature is passed on or (`**_`) dropped."""
    found = [
        f"{named(file)}:{node.lineno} {node.name}(**{node.args.kwarg.arg})"
        for file, node in _functions()
        if node.args.kwarg is not None
        and node.args.kwarg.arg != "_"
        and (node.args.kwarg.annotation is None or ast.unparse(node.args.kwarg.annotation) == "Any")
        and not node.name.startswith("_")
        and node.name not in FOREIGN_SIGNATURES
        and not any(
            isinstance(call, ast.Call) and getattr(call.func, "id", "") == "refuse"
            for call in ast.walk(node)
        )
    ]
    assert found == []


def test_public_modules_say_what_they_are() -> None:
    assert [
        named(f)
        for f in LIBRARY
        if f.read_text().strip() and not ast.get_docstring(ast.parse(f.read_text()))
    ] == []


def _functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    for file in LIBRARY:
        module = ast.parse(file.read_text())
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        for node in itertools.chain(module.body, *(c.body for c in classes)):
            if isinstance(node, ast.FunctionDef):
                yield file, node


def _swallowed() -> Iterator[str]:
    for file in LIBRARY:
        for node in ast.walk(ast.parse(file.read_text())):
            quiet: list[ast.expr | None] = []
            if isinstance(node, ast.ExceptHandler) and isinstance(node.body[0], ast.Pass):
                quiet = [node.type]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                quiet = [*node.args]
            if any(kind is None or BROAD & set(_names(kind)) for kind in quiet):
                yield f"{named(file)}:{getattr(node, 'lineno', 0)}"


def _names(expression: ast.expr) -> list[str]:
    return [node.id for node in ast.walk(expression) if isinstance(node, ast.Name)]
