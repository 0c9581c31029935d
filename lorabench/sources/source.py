"""Sources, runs that others have published, which are judged by model.

A source is a folder with tidy tables, `runs.csv` and perhaps `curves.csv` or `curves.parquet`, and a file `source.yaml`
that says where they are from, what a reader must know of them, and the SHA-256 of each table. The shipped sources also
hold the tables as they were published, and the script `convert.py` that wrote the tidy ones from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field, ValidationError

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.comparison import COMPARED
from lorabench.analysis.curves import curves_of
from lorabench.analysis.fit_rows import MIN_LRS
from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.optima import pooled_noise
from lorabench.analysis.rewards import is_sick
from lorabench.claims.claim import Claim
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.fields import NotNegative, Positive, PositiveFloat, Strict
from lorabench.config.margins import DEFAULT_MARGINS, Margins
from lorabench.errors import UserError
from lorabench.store.checks import check_curves, check_table, is_rl, refuse_rows
from lorabench.store.io import read_table, typed_columns, with_all_columns
from lorabench.store.schemas import CURVES, RUNS
from lorabench.store.tables import MIXED, ONE_SET, REMARK, UNKNOWN, Tables, with_stand_ins
from lorabench.utils.files import REFERENCE, file_sha256
from lorabench.utils.yaml_files import read_yaml

SOURCE_FILE = "source.yaml"

REWARD_SD = "final_reward_sd"
"""A column of runs that only sources have, the deviation over seeds of a mean accuracy; it is no tidy column."""

_NEEDED = ("run_id", "model", "dataset", "method", "status")
_CELL = ["model", "dataset", "task", "method", "rank", "placement", "alpha", "batch_size", "steps", "lr", "seed"]
"""The columns in which no two runs agree, as far as a source has them."""


class Origin(Strict):
    """Where the tables are from."""

    repository: str
    path: str
    commit: str
    date: str
    licence: str


class NoiseOf(Strict):
    """Noise between seeds for runs with one seed: sd, dof and source, or the name of another source as `from`."""

    sd: PositiveFloat | None = None
    """Standard deviation of the final loss in nats, or of the final accuracy as a share."""
    dof: Positive | None = None
    source: str | None = None
    other: str | None = Field(default=None, alias="from")


class ModelOf(Strict):
    """A model of a source."""

    scale: str
    """The column of the matrix, such as 0.6B."""
    parameters: Positive
    family: str | None = None
    hidden_size: Positive | None = None
    noise: NoiseOf | None = None


class Attributes(Strict):
    """The settings in which sources differ that are otherwise alike."""

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


class SourceFile(Strict):
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
    outcome: Literal["loss", "accuracy"] = "loss"
    """What supervised fine-tuning is judged by. Of an accuracy, `final_reward` of the runs is the test accuracy, and
    `base_reward` that of the base. Learning rates are still those of the loss, where there is one."""
    sha256: dict[Literal["runs.csv", "curves.csv", "curves.parquet"], str]
    """The SHA-256 of each table, so that a change is noticed."""


def import_source(folder: Path) -> tuple[SourceFile, Tables]:
    """Return the file of a source, and its runs and curves as published: nothing stands in for a loss that they lack.

    UserError says that the file `source.yaml` is absent, not YAML, or wrong (all wrong fields are named), a table has
    changed, or has something unexplained: an unknown column, a share above 1, or runs with equal settings and seed.
    """
    path = folder / SOURCE_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no source, since it has no file {SOURCE_FILE}")
    try:
        source = SourceFile.model_validate(read_yaml(path))
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, problem['loc']))} = {short(problem['input'])}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise UserError(f"{path}: {'; '.join(wrong)}") from error
    for table, sha256 in source.sha256.items():
        if not (folder / table).is_file():
            raise UserError(f"{folder / table}: there is no such file")
        if (measured := file_sha256(folder / table)) != sha256:
            raise UserError(f"{folder / table} has changed: its SHA-256 is {measured}, and {path} says {sha256}")
    runs = _runs(folder / "runs.csv", source)
    curves = read_table(folder, "curves") if len(source.sha256) > 1 else pd.DataFrame(columns=CURVES.names)
    curves = curves_of(curves, runs).reset_index(drop=True)
    check_tables(runs, curves, folder, accuracies=source.outcome == "accuracy")
    return source, Tables(runs, curves)


def _runs(path: Path, source: SourceFile) -> pd.DataFrame:
    """Read the runs, and add what the file says of the source and of its models where a run does not say it itself."""
    runs = read_table(path.parent, "runs")
    if absent := [repr(name) for name in _NEEDED if name not in runs]:
        raise UserError(f"{path}: has no column {', '.join(absent)}; it has {', '.join(map(str, runs.columns))}")
    if strange := [repr(name) for name in runs if name not in (*RUNS.names, REWARD_SD)]:
        raise UserError(f"{path}: no columns of the tidy table `runs`: {', '.join(strange)}")
    if undescribed := sorted(set(runs["model"].dropna()) - set(source.models)):
        raise UserError(f"{path}: model {', '.join(map(repr, undescribed))} is not described under `models`")
    said = source.attributes
    added: dict[str, Any] = {**said.model_dump(exclude={"alpha", "guessed"}), "seed": 0}
    added["alpha_convention"] = said.alpha if said.alpha in (UNKNOWN, MIXED) else f"alpha {said.alpha}"
    added |= dict.fromkeys(("constant_reward", "rule_reward"), said.guessed)
    for column, name in (("base_params", "parameters"), ("family", "family"), ("hidden_size", "hidden_size")):
        added[column] = runs["model"].map({model: getattr(about, name) for model, about in source.models.items()})
    kept = {name: value for name, value in added.items() if name not in runs and value is not None}
    return typed_columns(runs.assign(**kept), "runs", path)


def check_tables(runs: pd.DataFrame, curves: pd.DataFrame, place: Path, accuracies: bool = False) -> None:
    """Raise UserError, which names where the tables are from, if they are not valid or two runs have equal settings.

    With `accuracies`, each finished run needs one.
    """
    cell = [name for name in _CELL if name in runs]
    for _, row in runs.loc[runs.duplicated(cell), cell].iterrows():
        settings = ", ".join(f"{name} {value}" for name, value in row.dropna().items())
        raise UserError(f"{place}: has several runs with {settings}; give them seeds, or their mean as one run")
    try:
        check_table(with_stand_ins(runs))
        check_curves(curves)
        if accuracies:
            rewards = runs.reindex(columns=["run_id", "final_reward"])
            lacking = runs["status"].eq("done") & rewards["final_reward"].isna()
            refuse_rows(rewards, lacking, "run_id", "final_reward", "a share")
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


@dataclass(frozen=True)
class SourceModel:
    """The runs of one model in one source."""

    folder: str
    """The name of the source's folder."""
    file: SourceFile
    model: str
    about: ModelOf
    tables: Tables
    """Its runs, with the losses that stand in for others, and their curves."""
    is_rl: bool
    noise: Noise | None
    """Noise from elsewhere for runs with one seed: of final losses, in RL of final accuracies."""

    @property
    def by_accuracy(self) -> bool:
        """Whether its supervised fine-tuning is judged by accuracies."""
        return self.file.outcome == "accuracy" and not self.is_rl

    @property
    def has_losses(self) -> bool:
        """Whether its runs have losses, by which learning rates are then compared; otherwise they are error rates."""
        runs = self.tables.runs
        return not self.is_rl and "final_test_nll" in runs and bool(runs["final_test_nll"].notna().any())

    @property
    def name(self) -> str:
        """The source and the model's name without its owner."""
        return f"{self.folder}/{self.model.rsplit('/', 1)[-1]}"

    def conditions(self) -> list[pd.DataFrame]:
        """Return the runs of each dataset, batch size and number of steps, with LoRA on all layers if it has LoRA.

        Random facts are left out. The column `loss` is the test loss, in RL and without losses the error rate, and a
        sick run of RL counts as diverged, as it does in the claims.
        """
        runs = with_all_columns(self.tables.runs, "runs")
        runs = runs.assign(loss=runs["final_test_nll"] if self.has_losses else 1 - runs["final_reward"])
        if self.is_rl:
            runs = runs.assign(status=runs["status"].mask(is_sick(runs), "diverged"))
        facts = runs["data_kind"].eq("facts").fillna(False).astype(bool)
        runs = runs[(runs["placement"].isna() | runs["placement"].eq("all")) & ~facts]
        return [rows for _, rows in runs.groupby(["dataset", "batch_size", "steps"], dropna=False)]


def at_usual_alpha(lora: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of LoRA by which its optimal LR is measured: those at alpha 32, where ranks differ in alpha."""
    usual = lora["alpha"].astype(float).eq(ALPHA)
    return lora[usual] if usual.any() else lora


def source_folders(*more: Path) -> list[Path]:
    """Return the folders of the shipped sources, and of others: each a source, or a folder of sources."""
    folders: dict[str, Path] = {}
    for folder in (REFERENCE, *more):
        files = [*folder.glob(SOURCE_FILE), *sorted(folder.glob(f"*/{SOURCE_FILE}"))]
        # That a folder is no source is said when it is read.
        for inner in [file.parent for file in files] or [folder]:
            if inner.name in folders:
                raise UserError(f"two sources have the name {inner.name}: that of a source is that of its folder")
            folders[inner.name] = inner
    return list(folders.values())


def read_sources(folders: Sequence[Path]) -> list[SourceModel]:
    """Read sources (see `import_source`) and return their models; noise may be that of any shipped source."""
    imported = {folder: import_source(folder) for folder in folders}
    published = {folder.name: tables.runs for folder, (_, tables) in imported.items()}
    models = []
    for folder, (file, tables) in imported.items():
        for model, about in file.models.items():
            runs = tables.runs[tables.runs["model"] == model]
            if runs.empty:
                raise UserError(f"{folder}: no runs of the model {model!r}")
            stated, rl = about.noise or file.noise, bool(is_rl(runs).all())
            noise = None if stated is None else _noise(stated, folder, published, rl)
            own = Tables(with_stand_ins(runs.reset_index(drop=True)), curves_of(tables.curves, runs))
            models.append(SourceModel(folder.name, file, model, about, own, rl, noise))
    return sorted(models, key=lambda model: (model.about.parameters, model.name))


def _noise(stated: NoiseOf, folder: Path, published: dict[str, pd.DataFrame], rl: bool) -> Noise:
    """Return the noise that a source states, or that of another source; in RL from deviations of mean accuracies."""
    if stated.sd is not None and stated.dof is not None and stated.source is not None:
        return Noise(stated.sd, stated.dof, stated.source)
    name = str(stated.other)
    if name not in published and (REFERENCE / name / SOURCE_FILE).is_file():
        published[name] = import_source(REFERENCE / name)[1].runs
    if name not in published:
        raise UserError(f"{folder}: takes its noise from {name!r}, which is none of {', '.join(published)}")
    if not rl:
        return pooled_noise(with_stand_ins(published[name]), name)
    known = published[name].reindex(columns=[REWARD_SD, "n_seeds"]).astype(float).dropna()
    dof = known["n_seeds"] - 1
    if not dof.sum() > 0:
        raise UserError(f"{name}: has no accuracies with a deviation over seeds, so their noise is not known")
    sd = math.sqrt((dof * known[REWARD_SD] ** 2).sum() / dof.sum())
    return Noise.borrowed(sd, dof.sum(), f"{name} (SD {sd:.3f} of the accuracy, {dof.sum():.0f} degrees of freedom)")


BY_ACCURACY = "the test accuracy stands in for the test loss, so that losses are error rates"


def judge(source: SourceModel, claims: Sequence[Claim] = CLAIMS, margins: Margins | None = None) -> pd.DataFrame:
    """Judge claims on a source; LoRA is that of the ranks up to the highest one with a grid of LRs.

    Without margins, DEFAULT_MARGINS hold. The table `claims` begins with source, model, scale, parameters and doubts.
    """
    noise, reward_noise = (None, source.noise) if source.is_rl else (source.noise, None)
    tables = source.tables
    # The claims compare LoRA's highest rank at its optimal LR, of which fewer LRs say nothing. Without a rank that has
    # MIN_LRS of them, in a comparison and placement, all runs stay.
    runs = with_all_columns(tables.runs, "runs")
    ranks = runs["rank"].astype(float).where(runs["method"].eq("lora"))
    cells = [runs[name] for name in (*COMPARED, "placement")]
    n_lrs = runs.groupby([*cells, ranks], dropna=False)["lr"].transform("nunique")
    above = ranks > ranks.where(n_lrs >= MIN_LRS).groupby(cells, dropna=False).transform("max")
    tables = replace(tables, runs=tables.runs[~above])
    if source.by_accuracy:
        judged = judge_claims(_error_rates_as_losses(tables), claims, margins or DEFAULT_MARGINS, noise)
        judged["unit"] = judged["unit"].replace("nats per token", "error rate")
        for column in ("reason", "margin_rule"):
            judged[column] = judged[column].str.replace(r"\bnats\b", "in error rate", regex=True)
    else:
        judged = judge_claims(tables, claims, margins, noise, reward_noise)
    about: dict[str, Any] = {"source": source.folder, "model": source.model, "scale": source.about.scale}
    about |= {"parameters": source.about.parameters, "doubts": "; ".join(source.file.doubts)}
    return judged.assign(**about)[[*about, *judged]]


def _error_rates_as_losses(tables: Tables) -> Tables:
    """Return tables whose losses are error rates, and whose curves start at that of the base; other losses go.

    So do random facts, as in `SourceModel.conditions`: they are learned to the last, so that their error rates are 0.
    """
    runs = tables.runs
    runs = runs[~runs["data_kind"].eq("facts").fillna(False)] if "data_kind" in runs else runs
    runs = runs.reindex(columns=list(dict.fromkeys([*runs, "base_reward", "final_valid_reward"])))
    error = 1 - runs["final_reward"].astype(float)
    picked_by = (1 - runs["final_valid_reward"].astype(float)).fillna(error)
    remark = BY_ACCURACY if (picked_by != error).any() else f"{BY_ACCURACY}; {ONE_SET}"
    judged = runs.assign(final_valid_nll=picked_by, final_test_nll=error, **{REMARK: remark})
    base = runs[runs["base_reward"].notna()]
    first = base[["run_id"]].assign(step=0, split="validation", metric="nll", value=1 - base["base_reward"])
    others = tables.curves[tables.curves["metric"] != "nll"]
    return replace(tables, runs=judged, curves=pd.concat([others, first], ignore_index=True) if len(others) else first)
