"""The option --preset, which most commands have, and the plan and layout that a preset gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from lorabench.errors import UserError

if TYPE_CHECKING:
    # Imported when a command runs, since the help needs neither.
    from lorabench.planning.plan import Plan
    from lorabench.store.layout import Layout

T = TypeVar("T")

PresetOption = Annotated[
    str, typer.Option("--preset", help="A shipped preset's name or the path of a YAML file, with @HOURS for a budget.")
]


def plan_and_layout(preset: str) -> tuple[Plan, Layout]:
    """Return the plan of a preset, and the layout of its files.

    Raises:
        PresetError: there is no such preset, or it is not valid.
    """
    from lorabench.planning.plan import make_plan
    from lorabench.store.layout import Layout

    layout = Layout.of(preset)
    return make_plan(layout.preset), layout


def entry(section: Mapping[str, T], name: str, what: str) -> T:
    """Return the entry of a preset's section by its name.

    Args:
        what: what the section holds, such as `dataset`, for the message.

    Raises:
        UserError: the preset has no such entry.
    """
    if name not in section:
        raise UserError(f"{what} {name!r} is not in the preset; allowed: {', '.join(section)}")
    return section[name]
