"""The commands of the distribution lora-advice, which `lorabench` offers where both are installed.

They are found by the group `lorabench.commands` of entry points and imported when they are called.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperCommand

from lorabench.errors import UserError

COMMANDS = {
    "audit": "Say what is wrong in the configurations of other trainers, from the files alone.",
}
"""The help of each command."""


class _Unparsed(TyperCommand):
    """A command that leaves all words to another program, options and `--help` included."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words as they are."""
        ctx.args = list(args)
        return ctx.args


def _forward(context: typer.Context) -> None:
    commands = entry_points(group="lorabench.commands", name=context.info_name)
    if not commands:
        raise UserError(f"`lorabench {context.info_name}` needs the package lora-advice: pip install lora-advice")
    [command] = commands
    command.load()([context.info_name, *context.args], "lorabench")


def add_advice(app: typer.Typer) -> None:
    """Add the commands of lora-advice."""
    for name, text in COMMANDS.items():
        app.command(name, cls=_Unparsed, help=text)(_forward)
