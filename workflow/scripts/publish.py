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
        if held_out:
            print(publish_held_out(held_out, Path()))
        else:
            publish(Layout.of(preset), Path())


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


def publish_held_out(paths: Sequence[Path], root: Path) -> str:
    """Copy the claims and provenance of runs on held-out seeds to where the repository shows them; write the pages.

    They lie in the folder `held_out` of the published preset, with the table `came_out_again`. A preset that was never
    explored is published itself, with its pictures. `paths` are what `lorabench freeze` wrote. Several batches are the
    first that count; their claims are those of all together, `claims_by_batch` says how they came, and `came_out_again`
    has the verdicts of each alone. Nothing is changed if the runs did not keep to the frozen rules (see `check_kept`).
    Returns a sentence that counts the verdicts that came out again.
    """
    batches = {path: read_frozen(path) for path in paths}
    preset, again, frozen_in, runs = preset_path(batches[paths[0]].preset).stem, [], [], []
    for path, frozen in batches.items():
        layout = Layout.of(frozen.preset)
        claims = read_claims(layout.tables())
        runs.append(read_table(layout.tables(), "runs"))
        commit = check_kept(frozen, path, layout, runs[-1], claims)
        frozen_in.append(
            {"file": str(path), "commit": commit, "date": frozen.date, "rules_sha256": frozen.rules_sha256}
        )
        again.append(came_out_again(frozen, claims).assign(batch=frozen.preset))
    made, folder = provenance(layout, pd.concat(runs)) | {"frozen": frozen_in[0]}, root / PUBLISHED / preset
    explored, came = any(frozen.expected for frozen in batches.values()), pd.concat(again)
    drawn = sorted(layout.figures.glob("*.csv")) if explored else _drawn(layout)
    check_places(root, preset)
    if len(paths) > 1:
        if [frozen.preset for frozen in batches.values()] != registered(preset, len(paths)):
            raise UserError(f"{', '.join(map(str, paths))} are not the first batches of {preset} that count, in order")
        together = Layout.of(preset).batches("all")
        judge_registered(
            preset, Tables.read(*(Layout.of(frozen.preset).tables() for frozen in batches.values())), together
        )
        save_figure("verdicts", [together], together)
        write_csv(read_table(together, "claims_by_batch"), together / "claims_by_batch.csv")
        claims, made = read_claims(together), made | {"preset": preset, "frozen": frozen_in}
        drawn = [together / name for name in ("verdicts.svg", "verdicts.csv", "claims_by_batch.csv")]
    if explored or len(paths) > 1:
        folder = folder / HELD_OUT
    _copy(drawn, claims, made, folder)
    if folder.name == HELD_OUT:
        write_csv(came if len(paths) > 1 else came.drop(columns="batch"), folder / "came_out_again.csv")
    write_pages(root)
    return summary_of(came)


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
