"""Exporting presets as a dataset: parquet files, and a card that data hubs read.

Run it from the root of the repository: `python workflow/scripts/export.py FOLDER`, perhaps with `--preset laptop`. The
folder of each preset holds its tidy tables, which start with a column that names the preset.
"""

from __future__ import annotations

import re
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
from lorabench.store.io import read_table, table_path, write_table
from lorabench.store.layout import Layout
from lorabench.store.schemas import PRESET, SCHEMAS, description
from lorabench.utils import formats
from lorabench.utils.files import atomic_path, write_json
from lorabench.utils.markdown import table
from publish import provenance

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
    "claims_by_batch": "One row per claim and number of batches that were judged together.",
}
"""A sentence on each tidy table, by its name."""

_TITLE = "Runs that compare LoRA with full fine-tuning"
_SCHEMAS = {name: pa.schema([*PRESET, *schema]) for name, schema in SCHEMAS.items()}


def main(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the dataset.")],
    preset: Annotated[
        list[str] | None,
        typer.Option(help="A preset to export, as its name or YAML file; may be repeated. Default: all in results."),
    ] = None,
) -> None:
    """Write the tables of finished presets as a dataset: parquet, and a card for data hubs."""
    with in_one_sentence():
        for name, rows in export(preset or [], out).items():
            print(f"{name}: {', '.join(f'{count:,} {table}' for table, count in rows.items())}")
        print(f"wrote {out}; its page is {out / 'README.md'}")


def export(presets: Sequence[str], out: Path) -> dict[str, dict[str, int]]:
    """Write the tables of presets, or of all shipped ones that were run here, into a new folder, with a card.

    Returns by preset the number of rows of each of its tables.

    Raises:
        UserError: there is nothing of a preset, or the folder is not empty; then nothing is written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; export into a new folder, so that no older table is among the new ones")
    here = {path.parent.parent.name for path in Path("results").glob("*/tables/runs.*")}
    presets = presets or sorted(name for name in here if split_name(name)[0] in shipped("*"))
    if not presets:
        raise UserError("no shipped preset has tables in results; run one, or name yours with --preset")
    layouts = [Layout.of(name) for name in presets]
    for layout in layouts:
        if table_path(layout.tables(), "runs") is None:
            raise UserError(f"preset {layout.name} has no tables in {layout.tables()}; finish it first")
    rows: dict[str, dict[str, int]] = {layout.name: {} for layout in layouts}
    for layout in layouts:
        # On hubs, an `@` in a path would begin the name of a revision.
        own, folder = layout.tables(), out / layout.name.replace("@", "-from-seed-")
        write_json(provenance(layout, read_table(own, "runs")), folder / "provenance.json")
        for name in SCHEMAS:
            frame = read_table(own, name, optional=True)
            if len(frame):
                write_table(_exported(frame, name, layout.name), folder / f"{name}.parquet")
                rows[layout.name][name] = len(frame)
    with atomic_path(out / "README.md") as unfinished:
        unfinished.write_text(_card(rows), encoding="utf-8")
    return rows


def _exported(frame: pd.DataFrame, name: str, preset: str) -> pa.Table:
    """Return a table in the exported columns; the names of machines are left out, since they are private."""
    schema = _SCHEMAS[name]
    unknown = [column for column in schema.names if column not in frame or column == "host"]
    frame = frame.assign(**dict.fromkeys(unknown) | {"preset": preset})
    return pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)


def _card(rows: Mapping[str, Mapping[str, int]]) -> str:
    """Return the page of an exported dataset, by its numbers of rows; its head is for data hubs."""
    names = [name for name in SCHEMAS if any(name in counts for counts in rows.values())]
    configs = [{"config_name": name, "data_files": f"*/{name}.parquet"} for name in names]
    tags = ["lora", "peft", "fine-tuning", "learning-rate", "lorabench"]
    head = {"pretty_name": _TITLE, "license": "apache-2.0", "language": ["en"], "tags": tags, "configs": configs}
    presets = [[preset, *(formats.count(counts.get(name)) for name in names)] for preset, counts in rows.items()]
    lines = [
        f"# {_TITLE}",
        "",
        ABOUT,
        "",
        'Each table is a configuration: `load_dataset(folder, "runs")`. `lorabench claims` judges them.',
        "",
        *table(["preset", *names], presets),
        "",
        "The numbers are rows; a dash means that the table is not here. The column `host` is always null.",
    ]
    for name in names:
        # The pages that descriptions link to are not in the dataset.
        columns = [
            [f"`{column.name}`", type_name(column.type), re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", description(column))]
            for column in _SCHEMAS[name]
        ]
        lines += ["", f"## {name}", "", MEANINGS[name], "", *table(["column", "type", "meaning"], columns)]
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n" + "\n".join(lines) + "\n"


def type_name(kind: pa.DataType) -> str:
    """Return the name of a column's type as pages and cards have it."""
    names = {pa.float64(): "float64", pa.float32(): "float32", pa.list_(pa.string()): "list of strings"}
    return names.get(kind, str(kind))


if __name__ == "__main__":
    typer.run(main)
