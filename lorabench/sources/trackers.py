"""Readers of what other trainers and trackers keep of runs: files of transformers, exports of W&B, and TensorBoard.

A pickle, such as `training_args.bin`, is never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.errors import UserError
from lorabench.sources.logs import LoggedRun

_STEPS = ("train/global_step", "global_step", "Step", "_step", "step", "steps", "max_steps")
"""Columns of W&B with the step, the surest first: `Step` and `_step` count the calls of its log."""

_NAMES = ("Name", "name", "run_name", "run", "ID", "run_id")

_CARD = (
    r"^(?:- )?(base_model|datasets|learning_rate|(?:total_)?train_batch_size|seed|lr_scheduler_type):\s(?:- )?(\S.*)$"
)
"""The lines of a model card, of its head and of its list of hyperparameters, that say something of the run."""
_DATASET = r"fine-tuned version of .+ on the \[?([^\s\]]+)\S* dataset\."


def trainer_state(folder: Path) -> list[LoggedRun]:
    """Return the runs of transformers or TRL below a folder, each by the last of its files `trainer_state.json`.

    A run is the folder with such a file, or with a folder checkpoint-N that has one. Beside it, PEFT's
    `adapter_config.json`, the model's `config.json` and the model card tell of the run.
    """
    last: dict[Path, tuple[int, LoggedRun]] = {}
    for path in sorted(folder.rglob("trainer_state.json")):
        place = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
        with _readable(path):
            state = json.loads(path.read_text(encoding="utf-8"))
            done, history = int(state["global_step"]), dict[str, dict[int, float]]()
            for row in state["log_history"]:
                for key in (key for key, value in row.items() if isinstance(value, int | float)):
                    history.setdefault(key, {})[int(row["step"])] = float(row[key])
            about = {"global_step": done, "max_steps": int(state["max_steps"])} | (state.get("trial_params") or {})
            if place not in last or done >= last[place][0]:
                last[place] = done, LoggedRun(_name(place, folder), _beside(place) | about, history)
    return [run for _, run in last.values()]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Within the context, what a file should not hold is a UserError that names it."""
    try:
        yield
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} can't be read: {type(error).__name__}, {error}") from error


def _name(run: Path, folder: Path) -> str:
    """Return the name of a run's folder below another, or of the folder itself."""
    return run.resolve().name if run == folder else run.relative_to(folder).as_posix()


def _beside(run: Path) -> dict[str, Any]:
    """Return what the files of a run and of its checkpoints say: of its model, its adapter, and its model card."""
    about, folders = dict[str, Any](), [*run.glob("checkpoint-*"), run]
    for card in (folder / "README.md" for folder in folders):
        if card.is_file():
            text = card.read_text(encoding="utf-8", errors="replace")
            about |= [("datasets", name) for name in re.findall(_DATASET, text)] + re.findall(_CARD, text, re.MULTILINE)
    for name, method in (("config.json", "fullft"), ("adapter_config.json", "lora")):
        for path in (folder / name for folder in folders):
            if path.is_file():
                with _readable(path):
                    about |= {"peft_type": method, **json.loads(path.read_text(encoding="utf-8"))}
    return about


def wandb_csv(path: Path) -> list[LoggedRun]:
    """Return the runs of W&B in a CSV file, or in all of a folder: exports of the table of runs, of charts, or of
    histories.

    A table of runs has one row for each, a chart a column `RUN - METRIC` for each, and a history many rows, which name
    their run, or are of the run that the file is named after.
    """
    settings, histories = dict[str, dict[str, Any]](), dict[str, dict[str, dict[int, float]]]()
    counted: dict[str, str] = {}
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        with _readable(file):
            # W&B leaves a cell empty where there is no value, and writes NaN where this is the value.
            table = pd.read_csv(file, keep_default_na=False, na_values=[""])
            columns: list[str] = table.columns.tolist()
            step = next((name for name in _STEPS if name in columns), None)
            if step is None:
                raise UserError(f"{file}: has no column of optimizer steps; allowed: {', '.join(_STEPS)}")
            charts = [column for column in columns if " - " in column and not column.endswith(("__MIN", "__MAX"))]
            name = next((name for name in _NAMES if name in columns and table[name].notna().all()), None)
            runs = table[name].astype(str) if name else pd.Series(file.stem, table.index)
            if charts:
                long = table.melt(step, charts, "METRIC", "VALUE")
                long[["RUN", "METRIC"]] = long["METRIC"].str.rsplit(" - ", n=1, expand=True)
            else:
                long = table.assign(RUN=runs).melt(["RUN", step], None, "METRIC", "VALUE")
            if of_runs := not charts and name is not None and runs.is_unique:
                adapters = [column for column in columns if column.endswith(".peft_type")]
                for run, row in zip(runs, table.to_dict("records"), strict=True):
                    settings[run] = {str(key): value for key, value in row.items() if pd.notna(value)}
                    if adapters and not settings[run].keys() & set(adapters):
                        settings[run]["method"] = "fullft"
                # Beside metrics, such a table has settings.
                long = long[long["METRIC"].str.contains("/|loss")]
            long = long.dropna().assign(VALUE=pd.to_numeric(long["VALUE"], errors="coerce"))
            for run, metric, at, value in long[["RUN", "METRIC", step, "VALUE"]].itertuples(index=False):
                histories.setdefault(str(run), {}).setdefault(str(metric), {})[int(at)] = float(value)
            if step in ("Step", "_step") and not of_runs:
                counted |= dict.fromkeys(long["RUN"], f"{file}: its column {step}")
    for run in counted.keys() & {run for run, about in settings.items() if "train/global_step" in about}:
        raise UserError(f"{counted[run]} counts what {run} logged; allowed: a chart or history by train/global_step")
    return [LoggedRun(run, settings.get(run, {}), history) for run, history in histories.items()]


def tensorboard(folder: Path) -> list[LoggedRun]:
    """Return the runs below a folder by the event files of TensorBoard, each a folder with such files.

    A folder `runs/...` that transformers made belongs to the run that it is in, whose other files are read as well.
    UserError says that the package tensorboard is not installed.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise UserError("--from tensorboard needs the package tensorboard: pip install tensorboard") from error
    runs: dict[Path, LoggedRun] = {}
    for place in sorted({path.parent for path in folder.rglob("*tfevents*")}):
        run = place.parent.parent if place.parent.name == "runs" and place.parent != folder else place
        known = runs.setdefault(run, LoggedRun(_name(run, folder), _beside(run), {}))
        events = EventAccumulator(str(place), size_guidance={"scalars": 0})
        events.Reload()
        tags = events.Tags()
        for tag in tags["scalars"]:
            known.history.setdefault(tag, {}).update((event.step, event.value) for event in events.Scalars(tag))
        for tag in {"args/text_summary", "model_config/text_summary"} & set(tags["tensors"]):
            with _readable(place):
                known.settings.update(json.loads(events.Tensors(tag)[0].tensor_proto.string_val[0]))
    return list(runs.values())


READERS = {"trainer-state": trainer_state, "wandb-csv": wandb_csv, "tensorboard": tensorboard}
"""The readers by what they read, as `lorabench import --from` names it."""
