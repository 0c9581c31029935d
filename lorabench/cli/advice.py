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
    "check": "Say what an adapter's files say, and whether merging and serving keep what it computes.",
    "recommend": "Recommend learning rates with their interval, rank and placement for a model, each with its source.",
    "convert": "Convert a learning rate of LoRA to another alpha, rank, length, batch size or variant.",
    "trainer": "Write a folder to train from with the recommended settings, each with its reason.",
}
"""The help of each command."""


class _Unparsed(TyperCommand):
    """A command that leaves all words to another program, options and `--help` included."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words as they are."""
        ctx.args = args
        return args


def _forward(context: typer.Context) -> None:
    name = context.command.name or ""
    commands = entry_points(group="lorabench.commands", name=name)
    if not commands:
        raise UserError(f"`lorabench {name}` needs the package lora-advice: pip install lora-advice")
    [command] = commands
    command.load()([name, *context.args], "lorabench")


def add_advice(app: typer.Typer) -> None:
    """Add the commands of lora-advice."""
    for name, text in COMMANDS.items():
        app.command(name, cls=_Unparsed, help=text)(_forward)
