"""Judge everything that is published anew, from the runs that the repository keeps, and compare the answers.

    python workflow/scripts/rejudge.py FOLDER [--against OTHER | --write]

The saved runs in `paper_figures/partial` are judged by the rules of this code, and so are all sources in
`paper_figures/reference`. The tables, and one of what seeds do in the saved runs, are written into FOLDER and compared
with the committed ones, or with a folder that the same command wrote at another commit: all columns but the hash of the
rules, and numbers to nine digits. After a change of the rules, `--write` replaces the committed tables on saved runs,
and the claims and figures of the presets that were published with these runs. Presets of which no runs are kept (laptop
and long_runs) are run anew instead.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from contextlib import chdir
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd

from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.rewards import with_error_rates
from lorabench.claims.judge import judge_claims
from lorabench.config.loading import preset_path
from lorabench.data.identity import has_groups
from lorabench.data.sft import build_dataset
from lorabench.figures.catalog import FIGURES, save_figure
from lorabench.figures.evidence import evidence_tables
from lorabench.models.counts import counts_table
from lorabench.planning.plan import make_plan
from lorabench.sources.measurements import read_own
from lorabench.store.checks import is_rl
from lorabench.store.collect import test_groups
from lorabench.store.io import write_csv, write_frame
from lorabench.store.layout import Layout
from lorabench.store.published import NOT_PUBLISHED, evidence_folders, read_provenance
from lorabench.store.tables import Tables
from lorabench.utils.files import write_json
from pages import make_smaller
from saved_runs import saved_tables

PARTIAL, PUBLISHED = Path("paper_figures/partial"), Path("paper_figures/published")
ANSWERS = PUBLISHED / "rejudged.csv"
ANSWER_COLUMNS = ["preset", "claim_id", "verdict", "p_again", "estimate", "ci_low", "ci_high", "n_runs", "n_seeds"]
"""The columns of the committed answers on saved runs."""
NOISE = "noise.csv"
NOISE_COLUMNS = [
    *("comparison", "task", "n_arms", "n_seeds", "n_runs", "curvature"),
    *("common", "walk", "arm", "fullft", "run", "share", "growth", "curvatures"),
]
"""The columns of the table of what seeds do in saved runs."""


def saved_claims(name: str, counts: pd.DataFrame, write: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table `claims` of a preset's saved runs, and the sizes of what their seeds do (see `seed_noise`), with
    the preset's name; with `write`, replace what is published of the preset (see `republish`)."""
    layout = Layout.of(name)
    preset, saved = layout.preset, saved_tables(make_plan(layout.preset), layout)
    frames = {table: rows.to_pandas() for table, rows in saved.items()}
    losses = frames["test_losses"].merge(frames["runs"][["run_id", "model", "dataset"]], on="run_id")
    # The groups of test examples are in the data, which are made here.
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for model, dataset in losses[["model", "dataset"]].drop_duplicates().itertuples(index=False):
            if has_groups(preset.sources[dataset]):
                build_dataset(preset.datasets[dataset], layout.dataset(dataset), {})
                groups = np.array(test_groups(layout, model, dataset))
                own = losses["model"].eq(model) & losses["dataset"].eq(dataset)
                losses.loc[own, "group"] = groups[losses.loc[own, "example"]]
    frames |= {"test_losses": losses.drop(columns=["model", "dataset"]), "counts": counts}
    tables = Tables.of(frames)
    claims = judge_claims(tables, margins=preset.margins, predictions=preset.predictions or {})
    if write:
        republish(PUBLISHED / preset_path(name).stem, frames | {"claims": claims})
    claims, noise = claims.drop(columns=list(NOT_PUBLISHED)), seed_noise(tables)
    for table in (claims, noise):
        table.insert(0, "preset", name)
    return claims, noise


def republish(folder: Path, frames: dict[str, pd.DataFrame]) -> None:
    """Replace a published preset's claims, and its figures that show runs or claims, by those of tables."""
    claims, made = frames["claims"], read_provenance(folder)
    write_csv(claims.drop(columns=list(NOT_PUBLISHED)), folder / "claims.csv")
    if "frozen" in made and not claims["rules"].eq(made["frozen"]["rules_sha256"]).all():
        # Seeds that were held out for other rules are explored by now.
        write_json({"frozen_before": made.pop("frozen"), **made}, folder / "provenance.json")
    with tempfile.TemporaryDirectory() as work:
        for table, rows in frames.items():
            write_frame(rows, table, Path(work))
        for name in (path.stem for path in sorted(folder.glob("*.svg"))):
            if FIGURES[name].table in ("runs", "claims"):
                save_figure(name, [Path(work)], folder)
                (folder / f"{name}.png").unlink()
                make_smaller(folder / f"{name}.svg")


def seed_noise(tables: Tables) -> pd.DataFrame:
    """Return the sizes of what seeds do (`LossFit.sizes`) in each comparison with several seeds, of LoRA in the paper's
    parametrization and full fine-tuning; of RL in units of the error rate."""
    runs, rows = tables.runs[judged_arms(tables.runs)], []
    for task, of_task in (("sft", runs[~is_rl(runs)]), ("rl", with_error_rates(runs[is_rl(runs)]))):
        for comparison in comparisons(of_task, tables.curves) if len(of_task) else []:
            fit = comparison.fit
            if fit.sizes:
                counts = len(frozenset().union(*fit.seeds.values())), sum(map(len, fit.run_ids.values()))
                about = comparison.label, task, len(fit.lowest), *counts, median(fit.curvature.values())
                rows.append((*about, *fit.sizes.values()))
    return pd.DataFrame(rows, columns=NOISE_COLUMNS)


def differences(new_file: Path, old_file: Path) -> list[str]:
    """Return a line for each cell of an earlier table that the new one lacks or has otherwise."""
    new, old = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (new_file, old_file))
    if len(new) != len(old):
        return [f"{new_file.name}: {len(old)} rows before, {len(new)} now"]
    keys = [name for name in ("preset", "source", "model", "dataset", "claim_id", "measure") if name in old]
    lines = []
    for column in old.columns.drop("rules", errors="ignore"):
        if column not in new:
            lines.append(f"{new_file.name}: there is no column {column} any more")
            continue
        for row in old.index[new[column].ne(old[column])]:
            now, before = new.loc[row, column], old.loc[row, column]
            if not math.isclose(*pd.to_numeric(pd.Series([now, before]), errors="coerce"), rel_tol=1e-9):
                place = " ".join(filter(None, old.loc[row, keys]))
                lines.append(f"{new_file.name}, row {row}, {place}: {column} was {before!r}, is {now!r}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="a folder that this command wrote earlier")
    parser.add_argument("--write", action="store_true", help=f"write the new answers to {ANSWERS}")
    arguments = parser.parse_args()
    counts, claims, noise = counts_table(), list[pd.DataFrame](), list[pd.DataFrame]()
    # An unfinished preset is not looked at before its time.
    names = sorted(path.name for path in PARTIAL.iterdir() if read_provenance(PUBLISHED / preset_path(path.name).stem))
    for name in names:
        print(f"judging the saved runs of {name}", file=sys.stderr)
        # What is published of a preset is of its explored runs, if there were any, not of each batch.
        write = arguments.write and read_provenance(PUBLISHED / preset_path(name).stem)["preset"] == name
        for so_far, table in zip((claims, noise), saved_claims(name, counts, write), strict=True):
            so_far.append(table)
    out: Path = arguments.out
    answers = pd.concat(claims)
    write_csv(answers, out / ANSWERS.name)
    write_csv(pd.concat(noise).round(5), out / NOISE)
    if arguments.write:
        write_csv(answers[ANSWER_COLUMNS], ANSWERS)
        write_csv(pd.concat(noise).round(5), PUBLISHED / NOISE)
    print("judging the sources", file=sys.stderr)
    folders = evidence_folders(Path())
    tables = evidence_tables((), [read_own(folder, folder.name) for folder in folders], folders)
    for name, rows in tables.items():
        write_csv(rows, out / "evidence" / f"{name}.csv")
    lines = list[str]()
    for name in (ANSWERS.name, NOISE, *(f"evidence/{name}.csv" for name in tables)):
        lines += differences(out / name, (arguments.against or PUBLISHED) / name)
    print("\n".join(lines) or "no answer differs")
    return min(1, len(lines))


if __name__ == "__main__":
    sys.exit(main())
