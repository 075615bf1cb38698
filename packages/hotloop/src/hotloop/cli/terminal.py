"""What the commands share: the two consoles, JSON for programs, and examples in the help."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., None])


@functools.cache
def console() -> Console:
    """Results: standard output. Text is left to the terminal to wrap; a table or panel asks for soft_wrap=False."""
    from rich.console import Console

    return Console(soft_wrap=True)


@functools.cache
def errors() -> Console:
    """Progress and errors: standard error."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output, for a program to read."""
    console().print(json.dumps(value, indent=2, default=str), highlight=False, markup=False)


def examples(*lines: str) -> Callable[[Command], Command]:
    """Puts examples under a command's help."""

    def mark(command: Command) -> Command:
        command.__dict__["epilog"] = "\n\n".join(["[bold]Examples[/bold]", *lines])
        return command

    return mark
