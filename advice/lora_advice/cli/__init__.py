"""The command line `lora-advice`; a command imports what it needs when it runs, so that the help appears at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperGroup

from lora_advice.cli import settings
from lora_advice.cli.audit import audit
from lora_advice.cli.check import check
from lora_advice.errors import UserError
from lora_advice.formats import printable


class _OneSentence(TyperGroup):
    """A group of commands, each of which fails in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the user gave."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            for sentence in str(error).split("\n"):
                # A name may have any length, and what a terminal would obey.
                print(f"{ctx.info_name}: {printable(sentence[:2_000])}", file=sys.stderr)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_OneSentence,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Say what is wrong in LoRA configurations and adapters, and recommend settings, without a run.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lora-advice {version('lora-advice')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options that stand before a command."""


for command in (audit, check, settings.recommend, settings.convert, settings.trainer):
    app.command()(command)


def run(args: Sequence[str] | None = None, name: str = "lora-advice") -> None:
    """Run a command and exit; `lorabench` passes the words that it was given, and its own name."""
    app(args, prog_name=name)
