"""The tasks that an evaluation can name: those of lm-eval, and this project's own in the folder `tasks`.

`lm_eval` is imported where it is used: its import takes seconds, and the index of its tasks about a dozen more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.execution import EVAL_SOURCES, EvalTask
from lorabench.errors import UserError
from lorabench.store.layout import Layout
from lorabench.utils.files import write_json

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "tasks"

# The limit on new tokens that lm-eval uses for a task that sets none.
_MAX_NEW_TOKENS = 256

_SPLITTER = "tokenizers/punkt_tab"


@dataclass(frozen=True)
class LoadedTask:
    """A task of the preset with its data."""

    task: EvalTask
    leaves: dict[str, Task]  # The tasks that it consists of, by name.
    items: list[Any]  # These tasks, or the group that they are in lm-eval, as it takes them.


def task_index(tasks: Iterable[EvalTask]) -> TaskManager:
    """Return lm-eval's index of this project's tasks, and of its own where the preset names one of these.

    UserError says that a task is in neither.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    # The library warns of each dataset that it takes from its cache, which is intended.
    datasets.logging.set_verbosity_error()
    # lm-eval warns of each task of this project that reads its data by itself, which is intended.
    logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs" not in record.msg)
    names = [task.name for task in tasks]
    index = TaskManager(include_path=str(TASKS), include_defaults=any(name not in EVAL_SOURCES for name in names))
    for name in names:
        if name not in index.all_tasks:
            raise UserError(f"evaluation task {name!r} is not known to lm-eval; `lm-eval ls tasks` lists its tasks")
    return index


def load_task(index: TaskManager, task: EvalTask, layout: Layout) -> LoadedTask:
    """Build a task with its data; UserError says that these are missing, or that the task cannot be loaded."""
    if task.name in EVAL_SOURCES:
        path = layout.pretraining if task.source is None else layout.dataset(task.source)
        if not path.is_file():
            raise UserError(f"evaluation task {task.name!r} reads {path}, which does not exist; make it first")
        # In lm-eval, only a group can give a task of the index other settings than those of its YAML file.
        member = {"task": task.name, "dataset_kwargs": {"path": str(path)}}
        built = index.load({"group": "lorabench", "task": [member]})
        return LoadedTask(task, built["tasks"], list(built["tasks"].values()))
    try:
        built = index.load(task.name)
        if any("ifeval" in name for name in built["tasks"]):
            import nltk

            # IFEval downloads its sentence splitter when it is first loaded. If the download fails, it says nothing,
            # and fails later, at the first prompt about sentences.
            try:
                nltk.data.find(_SPLITTER)
            except LookupError:
                raise LookupError(f"nltk has no {_SPLITTER} in {', '.join(nltk.data.path)}") from None
    # Tasks bring code of their own, which raises errors of any kind for missing data or packages.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"task {task.name!r} can't be loaded; run `lorabench step fetch` online: {reason}") from error
    groups = [built["groups"][task.name]] if task.name in built["groups"] else list(built["tasks"].values())
    return LoadedTask(task, built["tasks"], groups)


def check_lengths(loaded: Iterable[LoadedTask], model: str, max_length: int) -> None:
    """Raise UserError if a task's answers leave no room for its prompts, at which lm-eval would fail after hours.

    A model takes at most `max_length` tokens of prompt and answer together.
    """
    for loaded_task in loaded:
        for name, leaf in loaded_task.leaves.items():
            own = (leaf.get_config("generation_kwargs") or {}).get("max_gen_toks", _MAX_NEW_TOKENS)
            drawn = loaded_task.task.max_new_tokens or own
            if leaf.OUTPUT_TYPE == "generate_until" and drawn >= max_length:
                raise UserError(f"task {name!r}: max_new_tokens = {drawn}; model {model!r} takes {max_length} in all")


def fetch_tasks(layout: Layout) -> None:
    """Look up every task of a preset, download the data of those on the hub, and write what the tasks consist of."""
    evaluation = layout.preset.evaluation
    if evaluation is None:
        raise UserError(f"preset {layout.name} has no evaluation")
    # The files that the project's own tasks read may not have been made yet.
    others = [task for task in evaluation.tasks if task.name not in EVAL_SOURCES]
    index = task_index(others) if others else None
    names: dict[str, list[str]] = {}
    for task in evaluation.tasks:
        names[task.name] = sorted(load_task(index, task, layout).leaves) if index and task in others else []
    write_json({"lm_eval": version("lm_eval"), "tasks": names}, layout.eval_tasks)


def data_revision(task: Task) -> str | None:
    """Return the commit of the hub's dataset that a task reads, or None if its data come from elsewhere.

    It is the name of the folder that the library `datasets` keeps the data in.
    """
    files = next(iter(task.dataset.values())).cache_files
    return Path(files[0]["filename"]).parent.name if files else None
