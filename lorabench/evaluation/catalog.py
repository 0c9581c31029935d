"""The tasks that an evaluation can name: lm-eval's, and this project's own in the folder `tasks`.

`lm_eval` is imported where it is used: it takes seconds, and the index of its own tasks a dozen more.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config import EVAL_SOURCES, EvalTask
from lorabench.errors import UserError
from lorabench.layout import Layout
from lorabench.records import write_json

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "tasks"

# Of a task that does not say, in lm-eval.
_MAX_NEW_TOKENS = 256

_SPLITTER = "tokenizers/punkt_tab"


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


def manager(tasks: Iterable[EvalTask]) -> TaskManager:
    """lm-eval's index: of this project's tasks, and of its own where one of them is asked for.

    Raises:
        UserError: a task that is in neither.
    """
    import logging

    import datasets
    from lm_eval.tasks import TaskManager

    # It warns of each set that it takes from its cache, which is meant.
    datasets.logging.set_verbosity_error()
    # It warns of each task of this project that the task makes its data itself, which is meant.
    logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs" not in record.msg)
    names = [task.name for task in tasks]
    index = TaskManager(include_path=str(TASKS), include_defaults=any(name not in EVAL_SOURCES for name in names))
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
    if task.name in EVAL_SOURCES:
        path = layout.pretraining if task.source is None else layout.dataset(task.source)
        if not path.is_file():
            raise UserError(f"evaluation task {task.name!r} reads {path}, which is not there; make it first")
        # A group is lm-eval's way to give a task of its index other settings than those of its YAML.
        member = {"task": task.name, "dataset_kwargs": {"path": str(path)}}
        built = index.load({"group": "lorabench", "task": [member]})
        return Loaded(task, built["tasks"], None)
    try:
        built = index.load(task.name)
        _check_splitter(built["tasks"])
    # Tasks bring code of their own, with whatever errors it raises for data or packages that are not there.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(
            f"evaluation task {task.name!r} can't be loaded; run `lorabench fetch` with a connection: {reason}"
        ) from error
    return Loaded(task, built["tasks"], built["groups"].get(task.name))


def _check_splitter(tasks: Iterable[str]) -> None:
    """Raise LookupError if IFEval's splitter of sentences is not there.

    IFEval downloads it when first loaded; if it can't, it says nothing, and fails at a prompt about sentences.
    """
    if any("ifeval" in name for name in tasks):
        import nltk

        try:
            nltk.data.find(_SPLITTER)
        except LookupError:
            raise LookupError(f"nltk has no {_SPLITTER} in {', '.join(nltk.data.path)}") from None


def check_settings(loaded: Iterable[Loaded], model: str, max_length: int) -> None:
    """Refuse settings that lm-eval would pass over, or fail at after hours.

    Args:
        model: name of the model, for the message.
        max_length: tokens that it takes, of prompt and answer together.

    Raises:
        UserError: a task's answers leave no room for its prompts, or it takes no examples and shall have some.
    """
    for one in loaded:
        for name, leaf in one.leaves.items():
            own = (leaf.get_config("generation_kwargs") or {}).get("max_gen_toks", _MAX_NEW_TOKENS)
            drawn = one.task.max_new_tokens or own
            if leaf.OUTPUT_TYPE == "generate_until" and drawn >= max_length:
                raise UserError(
                    f"evaluation task {name!r} draws up to {drawn} tokens; model {model!r} takes {max_length}, the "
                    "prompt among them; set the task's max_new_tokens to less"
                )
            if one.task.num_fewshot and leaf.get_config("num_fewshot") == 0:
                raise UserError(
                    f"evaluation task {name!r} takes no examples; num_fewshot = {one.task.num_fewshot} is given"
                )


def fetch(layout: Layout, path: Path) -> None:
    """Look up every task of a preset, download the data of those of the hub, and write their names and versions.

    Raises:
        UserError: a task is not known or can't be loaded.
    """
    evaluation = layout.preset.evaluation
    if evaluation is None:
        raise UserError(f"preset {layout.name} has no evaluation")
    index = manager(evaluation.tasks)
    found: dict[str, Any] = {}
    for task in evaluation.tasks:
        # The project's own files may not be made yet.
        leaves = {} if task.name in EVAL_SOURCES else load(index, task, layout).leaves
        found[task.name] = {
            name: {"version": str(leaf.VERSION), "data": data_revision(leaf)} for name, leaf in sorted(leaves.items())
        }
    write_json({"lm_eval": lm_eval_version(), "tasks": found}, path)


def data_revision(task: Task) -> str | None:
    """Commit of the hub's dataset that a task reads, which is the folder that `datasets` keeps it in; else None."""
    files = next(iter(task.dataset.values())).cache_files
    return Path(files[0]["filename"]).parent.name if files else None


def lm_eval_version() -> str:
    """Version of lm-eval."""
    from importlib.metadata import version

    return version("lm_eval")
