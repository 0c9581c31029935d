"""Exporting presets as a dataset: parquet files, and a card that data hubs read.

Run it from the root of the repository: `python workflow/scripts/export.py FOLDER`, perhaps with `--preset laptop`.

The folder of a preset holds its tidy tables, which start with a column that names the preset. A preset that was run
here is exported whole. Of others there is what the repository keeps: the runs that were saved, and published verdicts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer
import yaml

from lorabench.cli.common import in_one_sentence
from lorabench.config.loading import shipped, split_name
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.store.io import read_claims, read_table, table_path, write_table
from lorabench.store.layout import Layout
from lorabench.store.published import HELD_OUT, NOT_PUBLISHED, read_provenance
from lorabench.store.schemas import PRESET, SCHEMAS, description
from lorabench.utils import formats
from lorabench.utils.files import atomic_path, write_json
from lorabench.utils.markdown import table
from publish import provenance
from saved_runs import saved_tables

ABOUT = (
    "Runs of lorabench, which trains language models by LoRA and by full fine-tuning, at many learning rates each, and "
    'judges the claims of "LoRA Without Regret" (Schulman 2025) from these tables.'
)

MEANINGS = {
    "runs": "One row per run.",
    "curves": "One row per point of a learning curve.",
    "test_losses": "One row per run and example of its test split.",
    "compute": "One row per model and condition: a training step on random tokens that are all scored.",
    "counts": "LoRA's parameters on published architectures, counted on models without weights.",
    "evals": "Scores of lm-eval: one row per evaluated model, task, metric and filter.",
    "claims": "One row per claim of the paper.",
    "verdicts_by_margin": "One row per tested claim and size of the margins: what they would decide.",
}
"""A sentence on each tidy table, by its name."""

_TITLE = "Runs that compare LoRA with full fine-tuning"


def main(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the dataset.")],
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset to export, as its name or YAML file; may be repeated. Default: all that have tables here."
        ),
    ] = None,
    licence: Annotated[str, typer.Option(help="The licence of the tables, by its name on hubs.")] = "apache-2.0",
) -> None:
    """Write the tables of finished and published presets as a dataset: parquet, and a card for data hubs."""
    with in_one_sentence():
        presets = preset or exportable()
        if not presets:
            raise UserError(
                "no shipped preset has tables in results or paper_figures; run one, or name yours with --preset"
            )
        for name, rows in export(presets, out, licence).items():
            print(f"{name}: {', '.join(f'{count:,} {table}' for table, count in rows.items())}")
        print(f"wrote {out}; its page is {out / 'README.md'}")


def exportable() -> list[str]:
    """Return the shipped presets of which there are tables here, with those on published held-out seeds."""
    names = []
    for preset in shipped("*"):
        layout = Layout.of(preset)
        published = map(read_provenance, (layout.published, layout.published / HELD_OUT))
        named = {preset, *(made["preset"] for made in published if made)}
        names += [name for name in sorted(named) if _has_tables(Layout.of(name))]
    return names


def export(presets: Sequence[str], out: Path, licence: str) -> dict[str, dict[str, int]]:
    """Write the tables of presets into a folder that is empty or does not exist, with a card.

    Returns:
        By preset, the number of rows of each of its tables.

    Raises:
        UserError: there is nothing of a preset, the folder is not empty, or a table is damaged; only in the last case
            something may be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; export into a new folder, so that no older table is among the new ones")
    layouts = [Layout.of(name) for name in presets]
    for layout in layouts:
        if not _has_tables(layout):
            raise UserError(
                f"preset {layout.name} has no tables: neither in {layout.tables()}, where a finished preset has "
                f"them, nor in {layout.saved_runs} or {layout.published}"
            )
    rows: dict[str, dict[str, int]] = {}
    origins = {}
    for layout in layouts:
        # On hubs, an `@` in a path would begin the name of a revision.
        folder = out / layout.name.replace("@", "-from-seed-")
        tables, origins[layout.name] = _tables(layout, folder)
        rows[layout.name] = {name: len(exported) for name, exported in tables.items() if len(exported)}
        for name in rows[layout.name]:
            write_table(_with_preset(tables[name], layout.name, _exported(name)), folder / f"{name}.parquet")
    with atomic_path(out / "README.md") as unfinished:
        unfinished.write_text(_card(rows, origins, licence), encoding="utf-8")
    return rows


def _has_tables(layout: Layout) -> bool:
    own = table_path(layout.tables(), "runs") is not None
    return own or any(layout.saved_runs.glob("*.parquet")) or _published(layout) is not None


def _published(layout: Layout) -> Path | None:
    """Return the folder of a preset's published verdicts, or of those on its held-out seeds; None if there are none."""
    folder = layout.published.with_name(split_name(layout.name)[0])
    paths = (folder, folder / HELD_OUT)
    return next((path for path in paths if read_provenance(path).get("preset") == layout.name), None)


def _tables(layout: Layout, folder: Path) -> tuple[dict[str, pa.Table], str]:
    """Return the tables of a preset, and where they are from; write its provenance into a folder."""
    own, published = layout.tables(), _published(layout)
    if table_path(own, "runs"):
        write_json(provenance(layout, read_table(own, "runs")), folder / "provenance.json")
        named = [name for name in SCHEMAS if table_path(own, name)]
        return {name: _from_pandas(read_table(own, name), name) for name in named}, "the finished preset"
    tables, origins = dict[str, pa.Table](), []
    if any(layout.saved_runs.glob("*.parquet")):
        parts = list(saved_tables(make_plan(layout.preset), layout))
        tables |= {name: pa.concat_tables([part[name] for part in parts]) for name in parts[0]}
        origins.append("saved runs")
    if published is not None:
        tables["claims"] = _from_pandas(read_claims(published, without=NOT_PUBLISHED), "claims")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(published / "provenance.json", folder / "provenance.json")
        origins.append("published verdicts")
    return tables, " and ".join(origins)


def _from_pandas(frame: pd.DataFrame, name: str) -> pa.Table:
    schema = pa.schema([column for column in SCHEMAS[name] if column.name in frame])
    return pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)


def _exported(name: str) -> pa.Schema:
    return pa.schema([*PRESET, *SCHEMAS[name]])


def _with_preset(exported: pa.Table, preset: str, schema: pa.Schema) -> pa.Table:
    """Return a table in the exported columns; the names of machines are left out, since they are private."""
    columns = {name: exported[name] for name in schema.names if name in exported.column_names and name != "host"}
    columns["preset"] = pa.repeat(preset, len(exported))
    return pa.table([columns.get(name, pa.nulls(len(exported))) for name in schema.names], schema.names).cast(schema)


def _card(rows: Mapping[str, Mapping[str, int]], origins: Mapping[str, str], licence: str) -> str:
    """Return the page of an exported dataset, whose head is for data hubs and their libraries.

    Args:
        rows: by preset, the number of rows of its tables.
        origins: by preset, where its tables are from.
        licence: the licence's name on hubs.
    """
    names = [name for name in SCHEMAS if any(name in counts for counts in rows.values())]
    configs = [{"config_name": name, "data_files": f"*/{name}.parquet"} for name in names]
    tags = ["lora", "peft", "fine-tuning", "learning-rate", "lorabench"]
    head = {"pretty_name": _TITLE, "license": licence, "language": ["en"], "tags": tags, "configs": configs}
    presets = [
        [preset, *(formats.count(counts.get(name)) for name in names), origins[preset]]
        for preset, counts in rows.items()
    ]
    lines = [
        f"# {_TITLE}",
        "",
        ABOUT,
        "",
        'Each table is a configuration: `load_dataset(folder, "runs")`. `lorabench claims` judges them.',
        "",
        *table(["preset", *names, "from"], presets),
        "",
        "The numbers are rows; a dash means that the table is not here. Of presets that were not run where this "
        "dataset was made, it has the runs that the repository of lorabench keeps, if any, and the published verdicts "
        "without the ids of their runs. Saved runs whose data have changed since then have no `experiments`, and saved "
        "test losses have no `group`. The column `host` is always null.",
    ]
    for name in names:
        # The pages that descriptions link to are not in the dataset.
        meanings = [re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", description(column)) for column in _exported(name)]
        about = zip(_exported(name), meanings, strict=True)
        columns = [[f"`{column.name}`", type_name(column.type), meaning] for column, meaning in about]
        lines += ["", f"## {name}", "", MEANINGS[name], "", *table(["column", "type", "meaning"], columns)]
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n" + "\n".join(lines) + "\n"


def type_name(kind: pa.DataType) -> str:
    """Return the name of a column's type as pages and cards have it."""
    names = {pa.float64(): "float64", pa.float32(): "float32", pa.list_(pa.string()): "list of strings"}
    return names.get(kind, str(kind))


if __name__ == "__main__":
    typer.run(main)
