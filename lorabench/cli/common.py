"""What commands share: the option --preset, the end of a command that fails, and a job's own GPUs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer import Option
from typer.core import TyperGroup

from lorabench.errors import UserError
from lorabench.utils import signals
from lorabench.utils.exhaustion import memory_for, space_for
from lorabench.utils.formats import printable
from lorabench.utils.gpus import own_devices

if TYPE_CHECKING:
    # Imported when a command runs, since the help needs neither.
    from lorabench.planning.plan import Plan
    from lorabench.store.layout import Layout

T = TypeVar("T")

PresetOption = Annotated[str, Option("--preset", help="A shipped preset's name or the path of a YAML file.")]


def plan_and_layout(preset: str) -> tuple[Plan, Layout]:
    """Return the plan of a preset, and the layout of its files; UserError says that there is no such valid preset."""
    from lorabench.planning.plan import make_plan
    from lorabench.store.layout import Layout

    layout = Layout.of(preset)
    return make_plan(layout.preset), layout


def entry(section: Mapping[str, T], name: str, what: str) -> T:
    """Return the entry of a preset's section by its name, or raise UserError, which calls it `what`, as `dataset`."""
    if name not in section:
        raise UserError(f"{what} {name!r} is not in the preset; allowed: {', '.join(section)}")
    return section[name]


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Print an error that the user can correct as one sentence, without a traceback, and exit with status 2.

    A command that a signal stops exits with 128 plus the signal's number, as shells report it.
    """
    try:
        with (
            signals.stop_immediately(),
            space_for("this command's files"),
            memory_for("this command", "give it more, or a larger machine"),
        ):
            yield
    except UserError as error:
        for sentence in str(error).split("\n"):
            # A name may have any length, and what a terminal would obey.
            print(f"lorabench: {printable(sentence[:2_000])}", file=sys.stderr)
        raise typer.Exit(2) from error
    except signals.Stopped as stopped:
        print(f"lorabench: {stopped}", file=sys.stderr)
        raise typer.Exit(stopped.exit_status) from stopped


class OneSentence(TyperGroup):
    """A group of commands, each of which fails in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the user gave."""
        with in_one_sentence():
            return super().invoke(ctx)


def own_gpus(planned: Plan, processes: int = 1) -> AbstractContextManager[None]:
    """Within the context, a job has GPUs of its own if its preset is for GPUs.

    It begins before torch is imported, which then uses these GPUs.
    """
    if planned.preset.execution.gpu is None:
        return nullcontext()
    return own_devices(processes, lambda line: print(line, file=sys.stderr))
