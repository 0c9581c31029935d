"""Studies, the units that are judged: the runs of one model in one source, with their scale, noise and doubts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.analysis.comparison import curves_of
from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.pooled_noise import pooled_noise
from lorabench.claims.catalog import CLAIMS
from lorabench.claims.judge import judge_claims
from lorabench.errors import UserError
from lorabench.sources.reading import Imported, import_source
from lorabench.sources.schema import SOURCE_FILE, NoiseOf
from lorabench.store.checks import is_rl
from lorabench.store.tables import with_stand_ins
from lorabench.store.tables import Tables
from lorabench.utils.files import REFERENCE


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
    def scale(self) -> str:
        return self.of.source.models[self.model].scale

    @property
    def parameters(self) -> int:
        return self.of.source.models[self.model].parameters


def source_folders(*more: Path) -> list[Path]:
    """Return the folders of the shipped sources, and of others: each a source, or a folder of sources.

    Raises:
        UserError: a folder holds no source, or two sources have one name.
    """
    folders = [path.parent for path in sorted(REFERENCE.glob(f"*/{SOURCE_FILE}"))]
    for folder in more:
        inner = (
            [folder]
            if (folder / SOURCE_FILE).is_file()
            else [p.parent for p in sorted(folder.glob(f"*/{SOURCE_FILE}"))]
        )
        if not inner:
            raise UserError(f"{folder} is no source, since it has no file {SOURCE_FILE}")
        folders += inner
    twice = {folder.name for folder in folders if [other.name for other in folders].count(folder.name) > 1}
    if twice:
        raise UserError(f"two sources have the name {min(twice)}: the name of a source is that of its folder")
    return folders


def read_studies(folders: Sequence[Path]) -> list[Study]:
    """Read sources and return their studies.

    Raises:
        UserError: a source is refused (see `import_source`), or takes its noise from one that is not there or has none.
    """
    sources = {folder.name: import_source(folder) for folder in folders}
    studies = []
    for imported in sources.values():
        for model, of_model in imported.source.models.items():
            runs = imported.tables.runs[imported.tables.runs["model"] == model]
            if runs.empty:
                raise UserError(f"{imported.folder}: no runs of the model {model!r}")
            stated = of_model.noise or imported.source.noise
            rl = bool(is_rl(runs).all())
            noise = None if stated is None else _noise(stated, imported, sources, rl)
            tables = Tables(with_stand_ins(runs.reset_index(drop=True)), curves_of(imported.tables.curves, runs))
            studies.append(Study(imported, model, tables, None if rl else noise, noise if rl else None))
    return sorted(studies, key=lambda study: (study.parameters, study.name))


def _noise(stated: NoiseOf, imported: Imported, sources: dict[str, Imported], rl: bool) -> Noise:
    if stated.sd is not None and stated.dof is not None and stated.source is not None:
        return Noise(stated.sd, stated.dof, stated.source)
    other = sources.get(stated.other or "")
    if other is None:
        raise UserError(
            f"{imported.folder}: takes its noise from {stated.other!r}, which is none of {', '.join(sources)}"
        )
    runs = other.tables.runs
    return _reward_noise(runs, other.name) if rl else pooled_noise(with_stand_ins(runs), other.name)


def _reward_noise(runs: pd.DataFrame, source: str) -> Noise:
    """Return the pooled deviation of accuracies that are means of several seeds."""
    known = runs[runs["final_reward_sd"].notna()] if "final_reward_sd" in runs else runs.iloc[:0]
    dof = known["n_seeds"].astype(float) - 1 if len(known) else pd.Series(dtype=float)
    if not dof.sum() > 0:
        raise UserError(f"{source}: has no accuracies with a deviation over seeds, so their noise is not known")
    sd = math.sqrt(float((dof * known["final_reward_sd"] ** 2).sum() / dof.sum()))
    return Noise(sd, int(dof.sum()), f"{source} (SD {sd:.3f} of the accuracy, {dof.sum():.0f} degrees of freedom)")


def judge(study: Study) -> pd.DataFrame:
    """Judge all claims on a study.

    Returns:
        The table `claims` with the columns source, model, scale, parameters and doubts before its own.
    """
    claims = judge_claims(study.tables, CLAIMS, noise=study.noise, reward_noise=study.reward_noise)
    about: dict[str, Any] = {
        "source": study.of.name,
        "model": study.model,
        "scale": study.scale,
        "parameters": study.parameters,
        "doubts": "; ".join(study.of.source.doubts),
    }
    for place, (name, value) in enumerate(about.items()):
        claims.insert(place, name, value)
    return claims
