"""The file `source.yaml` of a source: where its tables are from, how they are read, and what is to be known of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from lorabench.config.fields import NotNegative, Positive, PositiveFloat, Strict
from lorabench.errors import UserError
from lorabench.store.schemas import CURVES, RUNS

SOURCE_FILE = "source.yaml"

EXTRA_COLUMNS = ("final_reward_sd",)
"""Columns of runs that only sources have: the deviation over seeds of a mean accuracy. They are not tidy columns."""

UNITS: dict[str, dict[str, float]] = {
    "loss": {"nats": 1.0, "bits": math.log(2)},
    "accuracy": {"share": 1.0, "percent": 0.01},
    "time": {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0},
    "memory": {"bytes": 1.0, "GB": 1e9, "GiB": 2.0**30},
}
"""By quantity: the units that a source may have, with their size in the unit of the tidy tables."""

_ALLOWED = {
    "attributes.precision": "in words, such as fp32 weights; or mixed, or unknown",
    "attributes.schedule": "in words, such as constant; or mixed, or unknown",
    "attributes.alpha": "a number or a rule, as text; or mixed, or unknown",
    "attributes.base_kind": "base, instruct, mixed or unknown",
}
"""What the required attributes may be, in words."""

_QUANTITIES = {
    **dict.fromkeys(("final_valid_nll", "final_test_nll", "final_test_nll_sd", "final_train_nll", "base_nll"), "loss"),
    **dict.fromkeys(
        ("base_reward", "final_valid_reward", "final_reward", "best_reward", "final_reward_sd"), "accuracy"
    ),
    "wall_s": "time",
    "peak_mem_bytes": "memory",
}


def quantity_of(column: str) -> str | None:
    """Return the quantity of a tidy column whose unit a source must state; None for other columns."""
    return _QUANTITIES.get(column)


class Origin(Strict):
    """Where the tables are from."""

    repository: str
    path: str
    commit: str
    date: str
    licence: str


class Column(Strict):
    """How a tidy column is read from a column of the source."""

    source: str = Field(alias="from")
    """The column of the source."""
    unit: str | None = None
    """The unit of the source's numbers: nats or bits; share or percent; seconds, minutes or hours; bytes, GB or GiB."""
    values: dict[str, Any] | None = None
    """The tidy value for each value of the source; a value that is not listed is refused."""


class LeaveOut(Strict):
    """Rows that are not read."""

    column: str
    """The column of the source."""
    values: list[str]
    reason: str


def _known_in_runs(columns: dict[str, Any]) -> dict[str, Any]:
    return _known("runs", columns, {*RUNS.names, *EXTRA_COLUMNS, "base_nll"})


def _known_in_curves(columns: dict[str, Any]) -> dict[str, Any]:
    return _known("curves", columns, set(CURVES.names))


def _known(table: str, columns: dict[str, Any], allowed: set[str]) -> dict[str, Any]:
    if strange := [repr(name) for name in columns if name not in allowed]:
        raise ValueError(f"no columns of the tidy table `{table}`: {', '.join(strange)}")
    return columns


def _with_units(columns: dict[str, Column]) -> dict[str, Column]:
    if wrong := [problem for name, column in columns.items() if (problem := _wrong_unit(name, column))]:
        raise ValueError("; ".join(wrong))
    return columns


def _wrong_unit(name: str, column: Column) -> str | None:
    """Return what is wrong with the unit of a column, in words; None if it is right."""
    quantity = quantity_of(name)
    if quantity is None:
        return None if column.unit is None else f"{name} has unit = {column.unit!r}, but this column has no unit"
    if column.unit in UNITS[quantity]:
        return None
    stated = "no unit" if column.unit is None else f"unit = {column.unit!r}"
    return f"{name} has {stated}; allowed: {', '.join(UNITS[quantity])}"


class FileOf(Strict):
    """A file, or several files of one kind, beside `source.yaml`."""

    file: str
    """The file's name, or a pattern such as `results/*.json`."""
    format: Literal["csv", "jsonl", "peft", "wandb"]
    """`csv` and `jsonl` are rows; `peft` is the result JSON of PEFT's method comparison, one file a run; `wandb` is an
    export of wandb as CSV or SQLite."""
    sha256: str
    """The SHA-256 of the file; of several files, that of their contents one after the other, by name."""
    table: str | None = None
    """The table of a SQLite file."""


class RunsOf(FileOf):
    """The runs of a source."""

    columns: Annotated[dict[str, Column], AfterValidator(_known_in_runs), AfterValidator(_with_units)]
    """The columns of the tidy table `runs`, and `base_nll` for the loss of the base model."""
    constants: Annotated[dict[str, Any], AfterValidator(_known_in_runs)] = Field(default_factory=dict)
    """Tidy columns with one value for all runs."""
    leave_out: list[LeaveOut] = Field(default_factory=list)
    one_run: list[str] = Field(default_factory=list)
    """Columns of the source that identify a run, where a run may be listed several times; equal rows are one run."""
    repeats: Literal["refuse", "mean"] = "refuse"
    """What runs with equal settings and one seed are: a mistake, or repeats, whose mean counts as one run, since a
    repeat with the same seed does not show the noise between seeds."""

    @model_validator(mode="after")
    def _with_models(self) -> RunsOf:
        if "model" not in self.columns and "model" not in self.constants:
            raise ValueError("neither columns nor constants say which model a run has")
        return self


class Metric(Strict):
    """A column of the source's curves that holds one metric."""

    column: str
    split: str
    metric: str


class CurvesOf(FileOf):
    """The learning curves of a source."""

    columns: Annotated[dict[str, Column], AfterValidator(_known_in_curves)]
    metrics: list[Metric] = Field(default_factory=list)
    """The metrics, where each has a column of its own."""
    shorter: Shorter | None = None


class Shorter(Strict):
    """Runs that are also read as shorter ones, which a constant learning rate allows."""

    models: list[str]
    steps: Positive
    window: Positive
    """The number of last steps whose mean training loss is the final one."""
    least: Positive
    """The number of steps that a run must have to be read so."""


class NoiseOf(Strict):
    """Noise between seeds for runs with one seed: a number, or the name of another source that has several seeds."""

    sd: PositiveFloat | None = None
    """Standard deviation of the final loss in nats, or of the final accuracy as a share."""
    dof: Positive | None = None
    source: str | None = None
    other: str | None = Field(default=None, alias="from")

    @model_validator(mode="after")
    def _one_of_two(self) -> NoiseOf:
        stated = [self.sd, self.dof, self.source]
        if (self.other is None) == (None in stated) or (self.other and any(part is not None for part in stated)):
            raise ValueError("state sd, dof and source, or the name of another source as `from`")
        return self


class ModelOf(Strict):
    """A model of a source."""

    scale: str
    """The column of the matrix, such as 0.6B."""
    parameters: Positive
    family: str | None = None
    hidden_size: Positive | None = None
    noise: NoiseOf | None = None


class Attributes(Strict):
    """What differs between sources that are otherwise alike."""

    precision: str
    """The precision of the weights that are trained. Here and below, `unknown` says that the source does not tell, and
    `mixed` that its runs differ and it does not tell which run has which."""
    schedule: str
    alpha: str
    """The value of alpha, or its rule."""
    unembedding: bool | None = None
    """Whether LoRA is on the unembedding too."""
    base_kind: Literal["base", "instruct", "mixed", "unknown"]
    max_new_tokens: NotNegative | None = None
    """The cap on the length of responses."""
    response_tokens: Positive | None = None
    """In RL without lengths of responses: a number of tokens that the mean response surely has."""
    guessed: Annotated[float, Field(gt=0, lt=1)] | None = None
    """In RL without controls: a share of problems that no constant answer or cheap rule surely exceeds."""


class Source(Strict):
    """A source of published runs."""

    about: str
    origin: Origin
    loss: str
    """What stands for the test loss, or the test accuracy, in words."""
    attributes: Attributes
    doubts: Annotated[list[str], Field(min_length=1)]
    """What a reader of its verdicts must know, such as one seed or no test split."""
    models: Annotated[dict[str, ModelOf], Field(min_length=1)]
    noise: NoiseOf | None = None
    runs: RunsOf
    curves: CurvesOf | None = None


CurvesOf.model_rebuild()
Source.model_rebuild()


def read_source_file(folder: Path) -> Source:
    """Read the file `source.yaml` of a folder.

    Raises:
        UserError: there is no such file, it is not YAML, or fields are missing or wrong, all of which are named.
    """
    path = folder / SOURCE_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no source, since it has no file {SOURCE_FILE}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return Source.model_validate(_with_short_columns(raw))
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(_sentences(error.errors()))}") from error


def _with_short_columns(raw: Any) -> Any:
    """Write `lr: LR`, the short form of a column without unit and values, as `lr: {from: LR}`."""
    if not isinstance(raw, dict):
        return raw
    long = dict(raw)
    for name in ("runs", "curves"):
        part = raw.get(name)
        if isinstance(part, dict) and isinstance(part.get("columns"), dict):
            columns = {key: {"from": text} if isinstance(text, str) else text for key, text in part["columns"].items()}
            long[name] = {**part, "columns": columns}
    return long


def _sentences(problems: Sequence[Any]) -> list[str]:
    """Return what is wrong with the file: first all missing fields, then a clause for each wrong one."""
    missing = [_missing(_place(problem)) for problem in problems if problem["type"] == "missing"]
    wrong = [_wrong(problem) for problem in problems if problem["type"] != "missing"]
    return [*([f"missing: {', '.join(missing)}"] if missing else []), *wrong]


def _missing(place: str) -> str:
    return f"{place} ({_ALLOWED[place]})" if place in _ALLOWED else place


def _wrong(problem: Any) -> str:
    place = _place(problem)
    if problem["type"] == "value_error":
        return f"{place}: {problem['ctx']['error']}"
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    if place in _ALLOWED:
        return f"{place} = {problem['input']!r}; allowed: {_ALLOWED[place]}"
    return f"{place} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _place(problem: Any) -> str:
    return ".".join(str(part) for part in problem["loc"])
