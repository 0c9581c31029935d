"""The commands on published runs: read a source into the tidy tables, and judge all sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorabench.cli.errors import in_one_sentence

app = typer.Typer()
_PANEL = "Commands"


@app.command("import", rich_help_panel=_PANEL)
def import_source(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with a file source.yaml and its tables.")],
    out: Annotated[Path, typer.Option(help="Folder for the tidy tables.")],
) -> None:
    """Read runs that others have published into the tidy tables, by the mapping in their source.yaml."""
    with in_one_sentence():
        from lorabench.sources.reading import import_source as read
        from lorabench.sources.reading import write_tables

        imported = read(source)
        write_tables(imported, out)
        print(f"{source}: {len(imported.tables.runs)} runs and {len(imported.tables.curves)} points of curves")


@app.command(rich_help_panel=_PANEL)
def evidence(
    out: Annotated[Path, typer.Option(help="Folder for the tables and figures.")] = Path("results/evidence"),
    source: Annotated[
        list[Path] | None,
        typer.Option(help="A source of your own, or a folder of sources, beside the shipped ones; may be repeated."),
    ] = None,
    tables: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with the table claims of a preset of your own, as a column; may be repeated."),
    ] = None,
    publish: Annotated[
        Path | None, typer.Option(help="The repository's root: write the matrix into its README and docs too.")
    ] = None,
) -> None:
    """Judge all published runs by the paper's claims, and test what would have been recommended for each.

    Writes the matrix of claims by scale, the forest plot, the known optimal learning rates, and how far off the
    recommended ones would have been for each source, had it not been known.
    """
    with in_one_sentence():
        from lorabench.report.blocks import published_folders
        from lorabench.report.publish import gather, publish_evidence, published_presets, write_evidence
        from lorabench.sources.own import read_own

        own = {preset.name: preset for preset in published_presets(publish or Path())}
        for folder in tables or []:
            # A finished preset stands for what was published of it.
            name = folder.parent.name if folder.name == "tables" else folder.name
            own[name] = read_own(folder, name)
        gathered = gather(source or (), list(own.values()), published_folders(publish or Path()))
        write_evidence(gathered, out)
        if publish is not None:
            publish_evidence(gathered, publish)
        print(f"{len(gathered.studies)} models of public sources judged; the matrix is in {out / 'matrix.svg'}")
