"""Sources, runs that others have published, and the studies that are judged: the runs of one model in one source.

A source is a folder with tidy tables, `runs.csv` and perhaps `curves.csv`, and a file `source.yaml` that says where
they are from, what a reader must know of them, and the SHA-256 of each table. The shipped sources also hold the tables
as they were published, and the script `convert.py` that wrote the tidy ones from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import Field, ValidationError, model_validator

from lorabench.analysis.curves import curves_of
from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.optima import pooled_noise
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.fields import NotNegative, Positive, PositiveFloat, Strict
from lorabench.errors import UserError
from lorabench.store.checks import check_curves, check_table, is_rl
from lorabench.store.io import read_table, typed_columns, write_frame
from lorabench.store.schemas import CURVES, RUNS
from lorabench.store.tables import MIXED, UNKNOWN, Tables, with_stand_ins
from lorabench.utils.files import REFERENCE, file_sha256

SOURCE_FILE = "source.yaml"

REWARD_SD = "final_reward_sd"
"""A column of runs that only sources have, the deviation over seeds of a mean accuracy; it is no tidy column."""

_NEEDED = ("run_id", "model", "dataset", "method", "status")
_CELL = ["model", "dataset", "task", "method", "rank", "placement", "alpha", "batch_size", "steps", "lr", "seed"]
"""The columns in which no two runs agree, as far as a source has them."""

_ALLOWED = {
    "attributes.precision": "a description such as fp32 weights; or mixed, or unknown",
    "attributes.schedule": "a description such as constant; or mixed, or unknown",
    "attributes.alpha": "a number or a rule, as text; or mixed, or unknown",
    "attributes.base_kind": "base, instruct, mixed or unknown",
}
"""What the required attributes may be, for a reader of an error."""


class Origin(Strict):
    """Where the tables are from."""

    repository: str
    path: str
    commit: str
    date: str
    licence: str


class NoiseOf(Strict):
    """Noise between seeds for runs with one seed: a number, or the name of another source that has several seeds."""

    sd: PositiveFloat | None = None
    """Standard deviation of the final loss in nats, or of the final accuracy as a share."""
    dof: Positive | None = None
    source: str | None = None
    other: str | None = Field(default=None, alias="from")

    @model_validator(mode="after")
    def _is_stated_or_borrowed(self) -> NoiseOf:
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
    """In RL without lengths of responses: a number of tokens that the mean response certainly has."""
    guessed: Annotated[float, Field(gt=0, lt=1)] | None = None
    """In RL without controls: a share of problems that no constant answer or cheap rule can exceed."""


class Source(Strict):
    """The file `source.yaml`."""

    about: str
    origin: Origin
    loss: str
    """What stands for the test loss, or the test accuracy, as a phrase."""
    attributes: Attributes
    doubts: Annotated[list[str], Field(min_length=1)]
    """What a reader of its verdicts must know, such as one seed or no test split."""
    models: Annotated[dict[str, ModelOf], Field(min_length=1)]
    noise: NoiseOf | None = None
    sha256: dict[Literal["runs.csv", "curves.csv"], str]
    """The SHA-256 of each table, so that a change is noticed."""


@dataclass(frozen=True)
class Imported:
    """A source with its tidy tables."""

    name: str
    folder: Path
    source: Source
    tables: Tables
    """Its runs and curves as published: nothing stands in for a loss that they lack."""


def read_source_file(folder: Path) -> Source:
    """Read the file `source.yaml` of a folder.

    Raises:
        UserError: there is no such file, it is not YAML, or fields are missing or wrong, all of which are named.
    """
    path = folder / SOURCE_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no source, since it has no file {SOURCE_FILE}")
    try:
        return Source.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        missing, wrong = [], []
        for problem in error.errors():
            place, kind = ".".join(map(str, problem["loc"])), problem["type"]
            if kind == "missing":
                missing.append(f"{place} ({_ALLOWED[place]})" if place in _ALLOWED else place)
            elif kind == "value_error":
                wrong.append(f"{place}: {problem['ctx']['error']}")
            elif kind == "extra_forbidden":
                wrong.append(f"{place}: unknown key")
            elif place in _ALLOWED:
                wrong.append(f"{place} = {problem['input']!r}; allowed: {_ALLOWED[place]}")
            else:
                wrong.append(f"{place} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
        sentences = [*([f"missing: {', '.join(missing)}"] if missing else []), *wrong]
        raise UserError(f"{path}: {'; '.join(sentences)}") from error


def import_source(folder: Path) -> Imported:
    """Read a source.

    Raises:
        UserError: the file `source.yaml` is wrong, a table has changed, or a table has something that is not explained:
            an unknown column, a share above 1, or two runs with equal settings and seed.
    """
    source = read_source_file(folder)
    for name, stated in source.sha256.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: there is no such file")
        if (measured := file_sha256(folder / name)) != stated:
            raise UserError(
                f"{folder / name} has changed: its SHA-256 is {measured}, and {folder / SOURCE_FILE} says {stated}"
            )
    runs = _runs(folder, source)
    curves = read_table(folder, "curves") if "curves.csv" in source.sha256 else pd.DataFrame(columns=CURVES.names)
    curves = curves[curves["run_id"].isin(runs["run_id"])].reset_index(drop=True)
    try:
        check_table(with_stand_ins(runs))
        check_curves(curves)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    return Imported(folder.name, folder, source, Tables(runs, curves))


def _runs(folder: Path, source: Source) -> pd.DataFrame:
    """Read the runs, and add what the file says of the source and of its models where a run does not say it itself."""
    path = folder / "runs.csv"
    runs = read_table(folder, "runs")
    if absent := [repr(name) for name in _NEEDED if name not in runs]:
        raise UserError(f"{path}: has no column {', '.join(absent)}; it has {', '.join(map(str, runs.columns))}")
    if strange := [repr(name) for name in runs if name not in (*RUNS.names, REWARD_SD)]:
        raise UserError(f"{path}: no columns of the tidy table `runs`: {', '.join(strange)}")
    if undescribed := sorted(set(runs["model"].dropna()) - set(source.models)):
        raise UserError(f"{path}: model {', '.join(map(repr, undescribed))} is not described under `models`")
    attributes, models = source.attributes, source.models
    alpha = attributes.alpha if attributes.alpha in (UNKNOWN, MIXED) else f"alpha {attributes.alpha}"
    added: dict[str, Any] = {
        "precision": attributes.precision,
        "schedule": attributes.schedule,
        "alpha_convention": alpha,
        "unembedding": attributes.unembedding,
        "base_kind": attributes.base_kind,
        "max_new_tokens": attributes.max_new_tokens,
        "response_tokens": attributes.response_tokens,
        "constant_reward": attributes.guessed,
        "rule_reward": attributes.guessed,
        "base_params": runs["model"].map({name: model.parameters for name, model in models.items()}),
        "family": runs["model"].map({name: model.family for name, model in models.items()}),
        "hidden_size": runs["model"].map({name: model.hidden_size for name, model in models.items()}),
        "seed": 0,
    }
    kept = {name: value for name, value in added.items() if name not in runs and value is not None}
    runs = typed_columns(runs.assign(**kept), "runs", path)
    cell = [name for name in _CELL if name in runs]
    if len(same := runs[runs.duplicated(cell, keep=False)]):
        settings = ", ".join(f"{name} {same[name].iloc[0]}" for name in cell if not pd.isna(same[name].iloc[0]))
        raise UserError(
            f"{path}: has several runs with {settings}; give them seeds of their own, or their mean as one run"
        )
    return runs


def write_tables(imported: Imported, out: Path) -> None:
    """Write the tables of a source into a folder, with the documented columns that the source has."""
    write_frame(imported.tables.runs, "runs", out, all_columns=False)
    write_frame(imported.tables.curves, "curves", out, all_columns=False)


@dataclass(frozen=True)
class Study:
    """The runs of one model in one source."""

    of: Imported
    model: str
    tables: Tables
    """Its runs, with the losses that stand in for others, and their curves."""
    noise: Noise | None
    """Noise of final losses from elsewhere, for supervised runs with one seed."""
    reward_noise: Noise | None
    """The same of final accuracies in RL."""

    @property
    def name(self) -> str:
        """The source and the model's name without its owner."""
        return f"{self.of.name}/{self.model.rsplit('/', 1)[-1]}"

    @property
    def is_rl(self) -> bool:
        """Whether its runs are of RL."""
        return bool(is_rl(self.tables.runs).all())

    @property
    def described(self) -> ModelOf:
        """What the source says of the model."""
        return self.of.source.models[self.model]

    def conditions(self) -> list[pd.DataFrame]:
        """Return the runs of each dataset, batch size and number of steps, with LoRA on all layers if it has LoRA.

        Random facts are left out. The column `loss` is the test loss, in RL the error rate.
        """
        runs = self.tables.runs
        columns = ("lr", "steps", "batch_size", "data_kind", "final_reward", "final_test_nll")
        runs = runs.reindex(columns=list(dict.fromkeys([*runs, *columns])))
        runs = runs.assign(loss=1 - runs["final_reward"] if self.is_rl else runs["final_test_nll"])
        runs = runs[(runs["placement"].fillna("all") == "all") & ~runs["data_kind"].eq("facts")]
        return [rows for _, rows in runs.groupby(["dataset", "batch_size", "steps"], dropna=False)]


def source_folders(*more: Path) -> list[Path]:
    """Return the folders of the shipped sources, and of others: each a source, or a folder of sources.

    Raises:
        UserError: a folder holds no source, or two sources have one name.
    """
    folders = [path.parent for path in sorted(REFERENCE.glob(f"*/{SOURCE_FILE}"))]
    for folder in more:
        inner = [path.parent for path in sorted(folder.glob(f"*/{SOURCE_FILE}"))]
        if (folder / SOURCE_FILE).is_file():
            inner = [folder]
        if not inner:
            raise UserError(f"{folder} is no source, since it has no file {SOURCE_FILE}")
        folders += inner
    names = [folder.name for folder in folders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two sources have the name {twice[0]}: the name of a source is that of its folder")
    return folders


def read_studies(folders: Sequence[Path]) -> list[Study]:
    """Read sources and return their studies.

    Raises:
        UserError: a source is refused (see `import_source`), or takes its noise from one that is not there or has none.
    """
    sources = {folder.name: import_source(folder) for folder in folders}
    studies = []
    for imported in sources.values():
        for model, described in imported.source.models.items():
            runs = imported.tables.runs[imported.tables.runs["model"] == model]
            if runs.empty:
                raise UserError(f"{imported.folder}: no runs of the model {model!r}")
            stated = described.noise or imported.source.noise
            rl = bool(is_rl(runs).all())
            noise = None if stated is None else _noise(stated, imported, sources, rl)
            tables = Tables(with_stand_ins(runs.reset_index(drop=True)), curves_of(imported.tables.curves, runs))
            studies.append(Study(imported, model, tables, None if rl else noise, noise if rl else None))
    return sorted(studies, key=lambda study: (study.described.parameters, study.name))


def _noise(stated: NoiseOf, imported: Imported, sources: dict[str, Imported], rl: bool) -> Noise:
    """Return the noise that a source states, or that of another source; in RL from deviations of mean accuracies."""
    if stated.sd is not None and stated.dof is not None and stated.source is not None:
        return Noise(stated.sd, stated.dof, stated.source)
    other = sources.get(stated.other or "")
    if other is None:
        raise UserError(
            f"{imported.folder}: takes its noise from {stated.other!r}, which is none of {', '.join(sources)}"
        )
    runs = other.tables.runs
    if not rl:
        return pooled_noise(with_stand_ins(runs), other.name)
    known = runs[runs[REWARD_SD].notna()] if REWARD_SD in runs else runs.iloc[:0]
    dof = known["n_seeds"].astype(float) - 1 if len(known) else pd.Series(dtype=float)
    if not dof.sum() > 0:
        raise UserError(f"{other.name}: has no accuracies with a deviation over seeds, so their noise is not known")
    sd = math.sqrt(float((dof * known[REWARD_SD].astype(float) ** 2).sum() / dof.sum()))
    return Noise(sd, int(dof.sum()), f"{other.name} (SD {sd:.3f} of the accuracy, {dof.sum():.0f} degrees of freedom)")


def judge(study: Study) -> pd.DataFrame:
    """Judge all claims on a study.

    Returns:
        The table `claims` with the columns source, model, scale, parameters and doubts before its own.
    """
    claims = judge_claims(study.tables, CLAIMS, noise=study.noise, reward_noise=study.reward_noise)
    about: dict[str, Any] = {
        "source": study.of.name,
        "model": study.model,
        "scale": study.described.scale,
        "parameters": study.described.parameters,
        "doubts": "; ".join(study.of.source.doubts),
    }
    for place, (name, value) in enumerate(about.items()):
        claims.insert(place, name, value)
    return claims
