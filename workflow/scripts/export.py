"""Exporting presets as a dataset: parquet files, a card that data hubs read, and Croissant metadata.

Run it from the root of the repository: `python workflow/scripts/export.py FOLDER`, perhaps with `--preset laptop`.

The folder of a preset holds its tidy tables, which start with a column that names the preset. A preset that was run
here is exported whole. Of others there is what the repository keeps: the runs that were saved, and published verdicts.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml

from lorabench.cli.common import in_one_sentence
from lorabench.config.loading import shipped, split_name
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.store.io import ROWS_AT_ONCE, read_claims, read_table, table_path, write_tables
from lorabench.store.layout import Layout
from lorabench.store.published import HELD_OUT, NOT_PUBLISHED, read_provenance
from lorabench.store.schemas import PARQUET_ONLY, PRESET, SCHEMAS, description
from lorabench.utils import formats
from lorabench.utils.files import atomic_path, damage_explained, write_json
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
_TAGS = ["lora", "peft", "fine-tuning", "learning-rate", "lorabench"]
_CROISSANT_TYPES = {
    pa.string(): "sc:Text",
    pa.bool_(): "sc:Boolean",
    pa.int32(): "sc:Integer",
    pa.int64(): "sc:Integer",
    pa.float32(): "sc:Float",
    pa.float64(): "sc:Float",
}
_CROISSANT_CONTEXT = Path(__file__).with_name("croissant_context.json")
"""The vocabulary of Croissant 1.0, which every file of metadata has to repeat."""


def main(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for the dataset.")],
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset to export, as its name or YAML file; may be repeated. Default: all that have tables here."
        ),
    ] = None,
    licence: Annotated[str, typer.Option(help="The licence of the tables, by its name on hubs.")] = "apache-2.0",
    url: Annotated[str | None, typer.Option(help="The address at which the dataset will be, for its metadata.")] = None,
) -> None:
    """Write the tables of finished and published presets as a dataset: parquet, a card for data hubs, and Croissant."""
    with in_one_sentence():
        presets = preset or exportable()
        if not presets:
            raise UserError(
                "no shipped preset has tables in results or paper_figures; run one, or name yours with --preset"
            )
        for name, rows in export(presets, out, licence, url).items():
            print(f"{name}: {', '.join(f'{count:,} {table}' for table, count in rows.items())}")
        print(f"wrote {out}; its page is {out / 'README.md'}")


def exportable() -> list[str]:
    """Return the shipped presets of which there are tables here, with those on published held-out seeds."""
    names = []
    for preset in shipped("*"):
        layout = Layout.of(preset)
        published = map(read_provenance, (layout.published, layout.published / HELD_OUT))
        named = {preset, *(made["preset"] for made in published if made)}
        names += [name for name in sorted(named) if _published(Layout.of(name)) or _has_runs(Layout.of(name))]
    return names


def export(presets: Sequence[str], out: Path, licence: str, url: str | None = None) -> dict[str, dict[str, int]]:
    """Write the tables of presets into a folder that is empty or does not exist, with card and metadata.

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
        if not (_has_runs(layout) or _published(layout)):
            raise UserError(
                f"preset {layout.name} has no tables: neither in {layout.tables()}, where a finished preset has "
                f"them, nor in {layout.saved_runs} or {layout.published}"
            )
    rows: dict[str, dict[str, int]] = {}
    origins = {}
    for layout in layouts:
        # On hubs, an `@` in a path would begin the name of a revision.
        folder = out / layout.name.replace("@", "-from-seed-")
        parts, origins[layout.name] = _tables(layout, folder)
        for name, tables in parts.items():
            schema = _exported(name)
            write_tables(
                (_with_preset(part, layout.name, schema) for part in tables), schema, folder / f"{name}.parquet"
            )
        counts = {name: pq.read_metadata(folder / f"{name}.parquet").num_rows for name in parts}
        rows[layout.name] = {name: count for name, count in counts.items() if count}
        for name in counts.keys() - rows[layout.name].keys():
            (folder / f"{name}.parquet").unlink()
    names = [name for name in SCHEMAS if any(name in counts for counts in rows.values())]
    write_json(croissant(names, out, licence, url), out / "croissant.json")
    with atomic_path(out / "README.md") as unfinished:
        unfinished.write_text(card(names, rows, origins, licence), encoding="utf-8")
    return rows


def _has_runs(layout: Layout) -> bool:
    return table_path(layout.tables(), "runs") is not None or any(layout.saved_runs.glob("*.parquet"))


def _published(layout: Layout) -> Path | None:
    """Return the folder of a preset's published verdicts, or of those on its held-out seeds; None if there are none."""
    folder = layout.published.with_name(split_name(layout.name)[0])
    for path in (folder, folder / HELD_OUT):
        if read_provenance(path).get("preset") == layout.name:
            return path
    return None


def _tables(layout: Layout, folder: Path) -> tuple[dict[str, Iterable[pa.Table]], str]:
    """Return the tables of a preset, in parts, and where they are from; write its provenance into a folder."""
    own, published = layout.tables(), _published(layout)
    if table_path(own, "runs"):
        write_json(provenance(layout, read_table(own, "runs")), folder / "provenance.json")
        return {name: _own(own, name) for name in SCHEMAS if table_path(own, name)}, "the finished preset"
    tables, origins = dict[str, Iterable[pa.Table]](), []
    if any(layout.saved_runs.glob("*.parquet")):
        parts = list(saved_tables(make_plan(layout.preset), layout))
        tables |= {name: [part[name] for part in parts] for name in parts[0]}
        origins.append("saved runs")
    if published is not None:
        claims = read_claims(published, without=NOT_PUBLISHED)
        tables["claims"] = [_from_pandas(claims, "claims")]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(published / "provenance.json", folder / "provenance.json")
        origins.append("published verdicts")
    return tables, " and ".join(origins)


def _own(folder: Path, name: str) -> Iterator[pa.Table]:
    """Yield the parts of a table of a finished preset; only large tables have more than one."""
    path = folder / f"{name}.parquet"
    if name in ("curves", *PARQUET_ONLY) and path.is_file():
        with damage_explained(path), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, use_threads=False):
                yield pa.Table.from_batches([batch])
    else:
        yield _from_pandas(read_table(folder, name), name)


def _from_pandas(frame: pd.DataFrame, name: str) -> pa.Table:
    schema = pa.schema([column for column in SCHEMAS[name] if column.name in frame])
    return pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)


def _exported(name: str) -> pa.Schema:
    return pa.schema([*PRESET, *SCHEMAS[name]])


def _with_preset(part: pa.Table, preset: str, schema: pa.Schema) -> pa.Table:
    """Return part of a table in the exported columns; the names of machines are left out, since they are private."""
    columns = {name: part[name] for name in schema.names if name in part.column_names and name != "host"}
    columns["preset"] = pa.repeat(preset, len(part))
    return pa.table([columns.get(name, pa.nulls(len(part))) for name in schema.names], schema.names).cast(schema)


def card(names: Sequence[str], rows: Mapping[str, Mapping[str, int]], origins: Mapping[str, str], licence: str) -> str:
    """Return the page of an exported dataset, whose head is for data hubs and their libraries.

    Args:
        names: the tables that at least one preset has.
        rows: by preset, the number of rows of its tables.
        origins: by preset, where its tables are from.
    """
    head = {
        "pretty_name": _TITLE,
        "license": licence,
        "language": ["en"],
        "tags": _TAGS,
        "configs": [{"config_name": name, "data_files": f"*/{name}.parquet"} for name in names],
        "dataset_info": [{"config_name": name, "features": list(map(_feature, _exported(name)))} for name in names],
    }
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
        columns = [[f"`{column.name}`", type_name(column.type), plain(column)] for column in _exported(name)]
        lines += ["", f"## {name}", "", MEANINGS[name], "", *table(["column", "type", "meaning"], columns)]
    about = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{about}---\n\n" + "\n".join(lines) + "\n"


def plain(column: pa.Field) -> str:
    """Return what a column means, without links to the pages of the documentation."""
    return re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", description(column))


def _feature(column: pa.Field) -> dict[str, str]:
    """Return a column as the head of a card has it."""
    kind = {"list": "string"} if pa.types.is_list(column.type) else {"dtype": type_name(column.type)}
    return {"name": column.name, **kind}


def type_name(kind: pa.DataType) -> str:
    """Return the name of a column's type as pages and cards have it."""
    names = {pa.float64(): "float64", pa.float32(): "float32", pa.list_(pa.string()): "list of strings"}
    return names.get(kind, str(kind))


def croissant(names: Sequence[str], out: Path, licence: str, url: str | None) -> dict[str, Any]:
    """Return the metadata of exported tables in the format Croissant 1.0, a vocabulary of JSON-LD."""
    return {
        "@context": json.loads(_CROISSANT_CONTEXT.read_text(encoding="utf-8")),
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "lorabench-runs",
        "description": ABOUT,
        "license": licence,
        **({"url": url} if url else {}),
        "creator": {"@type": "sc:Organization", "name": "lorabench"},
        "datePublished": date.today().isoformat(),
        "keywords": _TAGS,
        "distribution": [
            {"@type": "cr:FileSet", "@id": f"{name}-files", "name": f"{name}-files"}
            | {"encodingFormat": "application/x-parquet", "includes": f"*/{name}.parquet"}
            for name in names
        ],
        "recordSet": [
            {"@type": "cr:RecordSet", "@id": name, "name": name, "description": MEANINGS[name]}
            | {"field": [_croissant_field(name, column) for column in _exported(name)]}
            for name in names
        ],
    }


def _croissant_field(name: str, column: pa.Field) -> dict[str, Any]:
    repeated = pa.types.is_list(column.type)
    return {
        "@type": "cr:Field",
        "@id": f"{name}/{column.name}",
        "name": column.name,
        "description": plain(column),
        "dataType": _CROISSANT_TYPES[column.type.value_type if repeated else column.type],
        **({"repeated": True} if repeated else {}),
        "source": {"fileSet": {"@id": f"{name}-files"}, "extract": {"column": column.name}},
    }


if __name__ == "__main__":
    typer.run(main)
