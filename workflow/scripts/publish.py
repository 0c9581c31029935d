"""Publish a finished preset: copy its figures, claims and provenance to paper_figures/published, and write the pages.

Run it from the root of the repository: `python workflow/scripts/publish.py --preset laptop`, or with
`--held-out workflow/frozen/laptop.yaml` for the runs on held-out seeds that this file fixed. Several batches of seeds
are given by several of these options.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from lorabench.cli.common import PresetOption, in_one_sentence
from lorabench.config.loading import preset_path
from lorabench.errors import UserError
from lorabench.figures.catalog import save_figure
from lorabench.report import summary
from lorabench.report.batches import judge_registered
from lorabench.report.freeze import came_out_again, check_kept, preset_sha256, read_frozen, registered, summary_of
from lorabench.runs import PROTOCOL_VERSION
from lorabench.store.io import read_claims, read_table, write_csv
from lorabench.store.layout import Layout
from lorabench.store.published import HELD_OUT, NOT_PUBLISHED, PUBLISHED
from lorabench.store.tables import Tables
from lorabench.utils.files import write_json
from pages import check_places, make_smaller, write_pages


def main(
    preset: PresetOption = "laptop",
    held_out: Annotated[list[Path] | None, typer.Option(help="A file that `lorabench freeze` wrote.")] = None,
) -> None:
    """Copy a finished preset's figures and claims to paper_figures/published, and write them into README and docs.

    With frozen files, publish their runs on held-out seeds, if they kept to them; those of several are judged together.
    """
    with in_one_sentence():
        if not held_out:
            publish(Layout.of(preset), Path())
        elif len(held_out) == 1:
            print(publish_held_out(held_out[0], Path()))
        else:
            print(publish_batches(held_out, Path()))


def publish(layout: Layout, root: Path) -> None:
    """Copy the figures, claims and provenance of a finished preset to where the repository shows them; write its pages.

    UserError says what is missing, before anything is changed.
    """
    if layout.preset.first_seed:
        how = "publish it with --held-out and the file that `lorabench freeze` wrote"
        raise UserError(f"preset {layout.name} has other seeds than the explored ones; {how}")
    runs, claims = read_table(layout.tables(), "runs"), read_claims(layout.tables())
    drawn = _drawn(layout)
    # Nothing is written before every part is known to have its place.
    check_places(root, layout.name)
    _copy(drawn, claims, provenance(layout, runs), layout.published)
    write_pages(root)


def _drawn(layout: Layout) -> list[Path]:
    """Return the files of a finished preset's figures: the pictures, and the tables of what they show."""
    drawn = sorted(path for path in layout.figures.glob("*.*") if path.suffix in (".svg", ".csv"))
    if layout.figures / "verdicts.svg" not in drawn:
        raise UserError(f"figure {layout.figures}/verdicts.svg does not exist; run the preset {layout.name} first")
    return drawn


def _copy(figures: Iterable[Path], claims: pd.DataFrame, made: Mapping[str, Any], folder: Path) -> None:
    """Make a folder's files those of a preset: its figures, claims and provenance."""
    for path in set(folder.glob("*.*")):
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for path in figures:
        shutil.copyfile(path, folder / path.name)
        if path.suffix == ".svg":
            make_smaller(folder / path.name)
    write_csv(claims.drop(columns=list(NOT_PUBLISHED)), folder / "claims.csv")
    write_json(made, folder / "provenance.json")


def publish_held_out(path: Path, root: Path) -> str:
    """Copy the claims, provenance and figures' tables of runs on held-out seeds to where the repository shows them.

    They lie in the folder `held_out` of the published preset, with the table `came_out_again`. A preset that was never
    explored is published itself, with its pictures. The pages are written; `path` is what `lorabench freeze` wrote.
    Nothing is changed if the runs did not keep to the frozen rules (see `check_kept`). Returns a sentence that counts
    the verdicts that came out again.
    """
    frozen = read_frozen(path)
    layout = Layout.of(frozen.preset)
    runs, claims = read_table(layout.tables(), "runs"), read_claims(layout.tables())
    commit = check_kept(frozen, path, layout, runs, claims)
    again, folder = came_out_again(frozen, claims), root / PUBLISHED / preset_path(frozen.preset).stem
    frozen_in = {"file": str(path), "commit": commit, "date": frozen.date, "rules_sha256": frozen.rules_sha256}
    made = provenance(layout, runs) | {"frozen": frozen_in}
    if frozen.expected:
        check_places(root)
        _copy(sorted(layout.figures.glob("*.csv")), claims, made, folder / HELD_OUT)
        write_csv(again, folder / HELD_OUT / "came_out_again.csv")
    else:
        drawn = _drawn(layout)
        check_places(root, folder.name)
        _copy(drawn, claims, made, folder)
    write_pages(root)
    return summary_of(again)


def publish_batches(paths: Sequence[Path], root: Path) -> str:
    """Judge the runs of several batches of a preset together, and publish the claims in its folder `held_out`.

    There are the tables `claims` and `claims_by_batch`, the provenance, and `came_out_again`, which has the verdicts of
    each batch alone beside the explored ones. The pages are written; `paths` are what `lorabench freeze` wrote of the
    first batches that count. Nothing is changed if the runs did not keep to the frozen rules (see `check_kept`).
    Returns a sentence that counts the verdicts that came out again.
    """
    batches = [read_frozen(path) for path in paths]
    preset = preset_path(batches[0].preset).stem
    if wrong := [batch.preset for batch in batches if batch.preset not in registered(preset, len(batches))]:
        raise UserError(f"{wrong[0]} is not one of the first {len(batches)} batches of {preset} that count")
    again, frozen_in, runs = [], [], []
    for path, batch in zip(paths, batches, strict=True):
        layout = Layout.of(batch.preset)
        runs.append(read_table(layout.tables(), "runs"))
        claims = read_claims(layout.tables())
        commit = check_kept(batch, path, layout, runs[-1], claims)
        frozen_in.append({"batch": batch.preset, "file": str(path), "commit": commit, "date": batch.date})
        again.append(came_out_again(batch, claims).assign(batch=batch.preset))
    check_places(root, preset)
    together, folder = Layout.of(preset).batches("all"), root / PUBLISHED / preset / HELD_OUT
    judge_registered(preset, Tables.read(*(Layout.of(batch.preset).tables() for batch in batches)), together)
    save_figure("verdicts", [together], together)
    made = provenance(Layout.of(preset), pd.concat(runs)) | {"frozen": frozen_in}
    _copy([together / "verdicts.svg", together / "verdicts.csv"], read_claims(together), made, folder)
    write_csv(pd.concat(again), folder / "came_out_again.csv")
    write_csv(read_table(together, "claims_by_batch"), folder / "claims_by_batch.csv")
    write_pages(root)
    return summary_of(pd.concat(again))


def provenance(layout: Layout, runs: pd.DataFrame) -> dict[str, Any]:
    """Return what the results of a preset were computed from: the preset, the runs, the machines and the code."""
    environment = summary.environment(runs)
    return {
        "preset": layout.name,
        "preset_sha256": preset_sha256(layout.preset),
        "protocol_version": PROTOCOL_VERSION,
        "runs": len(runs),
        "runs_by_status": {str(status): int(count) for status, count in runs["status"].value_counts().items()},
        "run_seconds": round(float(runs["wall_s"].sum())),
        "devices": environment["devices"],
        "threads_per_job": [int(threads) for threads in environment["threads"]],
        "first_started": environment["started"][0],
        "last_started": environment["started"][1],
        "commits": environment["commits"],
        "runs_of_changed_code": environment["dirty"],
        "versions": environment["versions"],
        "inputs": summary.inputs(runs),
    }


if __name__ == "__main__":
    typer.run(main)
