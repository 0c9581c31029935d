"""The tasks that an evaluation can name: lm-eval's, and this project's own in the folder `tasks`.

`lm_eval` is imported where it is used: it takes seconds, and the index of its own tasks a dozen more.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config import ChatDataset, EvalTask, ReasoningProblems
from lorabench.errors import UserError
from lorabench.layout import Layout
from lorabench.records import write_json

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "tasks"

# Kind of dataset or problem set that a task of this project reads; None for the held-out pretraining text.
READS = {
    "lorabench_worked": "worked",
    "lorabench_instruct": "instruct",
    "lorabench_arithmetic": "arithmetic",
    "lorabench_pretraining": None,
}


@dataclass(frozen=True)
class Loaded:
    """A task of the preset, built: the tasks it consists of by name, and lm-eval's group if it is one."""

    task: EvalTask
    leaves: dict[str, Task]
    group: Group | None

    @property
    def items(self) -> list[Any]:
        """What lm-eval is given."""
        return list(self.leaves.values()) if self.group is None else [self.group]


def check(tasks: Iterable[EvalTask], layout: Layout) -> None:
    """Refuse a task of this project whose source is not what it reads.

    Raises:
        UserError: no source, one of another kind, or one that nothing reads.
    """
    sources = layout.preset.sources
    for task in tasks:
        wanted = READS.get(task.name)
        if wanted is None:
            if task.source is not None:
                raise UserError(f"evaluation task {task.name!r} reads no source; {task.source!r} is given")
            continue
        kinds = {name: spec.kind for name, spec in sources.items() if isinstance(spec, ChatDataset | ReasoningProblems)}
        if task.source is None or kinds.get(task.source) != wanted:
            allowed = ", ".join(name for name, kind in kinds.items() if kind == wanted) or "none in this preset"
            given = f"source {task.source!r}"
            raise UserError(f"evaluation task {task.name!r} has {given}; it reads a source of kind {wanted}: {allowed}")


def manager(tasks: Iterable[EvalTask]) -> TaskManager:
    """lm-eval's index: of this project's tasks, and of its own where one of them is asked for.

    Raises:
        UserError: a task that is in neither.
    """
    import logging

    from lm_eval.tasks import TaskManager

    # It warns of each task of this project that the task makes its data itself, which is meant.
    logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs" not in record.msg)
    names = [task.name for task in tasks]
    index = TaskManager(include_path=str(TASKS), include_defaults=any(name not in READS for name in names))
    for name in names:
        if name not in index.all_tasks:
            near = difflib.get_close_matches(name, index.all_tasks, n=5, cutoff=0.5)
            known = f"; near it: {', '.join(near)}" if near else ""
            raise UserError(f"evaluation task {name!r} is not known to lm-eval{known}")
    return index


def load(index: TaskManager, task: EvalTask, layout: Layout) -> Loaded:
    """Build a task with its data.

    Raises:
        UserError: its data are not there.
    """
    if task.name in READS:
        path = layout.pretraining if task.source is None else layout.dataset(task.source)
        if not path.is_file():
            raise UserError(f"evaluation task {task.name!r} reads {path}, which is not there; make it first")
        # A group is lm-eval's way to give a task of its index other settings than those of its YAML.
        member = {"task": task.name, "dataset_kwargs": {"path": str(path)}}
        built = index.load({"group": "lorabench", "task": [member]})
        return Loaded(task, built["tasks"], None)
    try:
        built = index.load(task.name)
    # Tasks bring code of their own, with whatever errors it raises for data or packages that are not there.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(
            f"evaluation task {task.name!r} can't be loaded; run `lorabench fetch` with a connection: {reason}"
        ) from error
    return Loaded(task, built["tasks"], built["groups"].get(task.name))


def fetch(layout: Layout, path: Path) -> None:
    """Look up every task of a preset, download the data of those of the hub, and write their names and versions.

    Raises:
        UserError: a task is not known, reads another kind of source, or can't be loaded.
    """
    evaluation = layout.preset.evaluation
    if evaluation is None:
        raise UserError(f"preset {layout.name} has no evaluation")
    check(evaluation.tasks, layout)
    index = manager(evaluation.tasks)
    found: dict[str, Any] = {}
    for task in evaluation.tasks:
        # The project's own files may not be made yet.
        leaves = {} if task.name in READS else load(index, task, layout).leaves
        found[task.name] = {name: str(leaf.VERSION) for name, leaf in sorted(leaves.items())}
    write_json({"lm_eval": lm_eval_version(), "tasks": found}, path)


def lm_eval_version() -> str:
    """Version of lm-eval."""
    from importlib.metadata import version

    return version("lm_eval")
