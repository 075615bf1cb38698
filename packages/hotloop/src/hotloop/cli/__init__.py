"""The command line. Nothing heavy is imported before a command needs it, so help answers at once."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer
from hotloop_core.errors import HotloopError

from .chat import chat
from .data import data
from .doctor import doctor
from .export import export
from .new_family import new_family
from .plan import plan
from .plugins import plugins
from .quickstart import quickstart
from .schema import schema
from .terminal import errors
from .train import train
from .verify import verify

app = typer.Typer(
    name="hotloop",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EXAMPLES = """
[bold]Examples[/bold]

hotloop quickstart

hotloop train recipe.toml --set lora.r=32

hotloop chat runs/first
"""


@app.callback(epilog=_EXAMPLES)
def hotloop(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune Hugging Face models faster and in less memory."""


for _command in (
    quickstart,
    train,
    data,
    chat,
    plan,
    verify,
    export,
    plugins,
    new_family,
    doctor,
    schema,
):
    app.command(epilog=_command.__dict__.get("epilog"))(_command)


_INTERRUPTED = 130
"""What typer exits with after Ctrl-C, without a word."""


def main() -> None:
    """Runs the command line; a HotloopError becomes a panel and exit status 1, wrong usage 2, Ctrl-C 130."""
    # Deprecations inside these packages are for their authors; a user of the command cannot act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\b")
    warnings.filterwarnings("ignore", message=r"Could not find a config file in .*\.gguf")
    try:
        app()
    except HotloopError as error:
        if "--debug" in sys.argv:
            raise
        from rich.panel import Panel
        from rich.text import Text

        panel = Panel(
            Text(str(error)), title=type(error).__name__, title_align="left", border_style="red"
        )
        errors().print(panel, soft_wrap=False)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        trains = "train" in sys.argv[1:2]
        errors().print(
            "interrupted; `hotloop train RECIPE --resume` goes on from the newest checkpoint, if there is one"
            if trains
            else "interrupted"
        )
        sys.exit(_INTERRUPTED)
