"""Judge all shipped sources beside the published presets; write the evidence, its pages, and lora-advice's facts.

Run it from the root of the repository: `python workflow/scripts/evidence.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import typer

from facts import write_facts
from lorabench.cli.common import in_one_sentence
from lorabench.figures.evidence import evidence_tables, write_evidence
from lorabench.sources.measurements import read_own
from lorabench.store.published import PUBLISHED, evidence_folders
from pages import check_places, make_smaller, write_pages


def main() -> None:
    """Judge all shipped sources, and write tables, pictures, README and docs."""
    with in_one_sentence():
        folders = evidence_folders(Path())
        own = [read_own(folder, folder.name) for folder in folders]
        publish_evidence(evidence_tables(own=own, presets=folders), Path())
        write_facts(Path())


def publish_evidence(tables: Mapping[str, pd.DataFrame], root: Path) -> None:
    """Write the evidence to where a repository shows it, and the parts of its pages, if all have their place."""
    check_places(root)
    write_evidence(tables, root / PUBLISHED / "evidence")
    for name in ("matrix.svg", "forest.svg"):
        make_smaller(root / PUBLISHED / "evidence" / name)
    write_pages(root)


if __name__ == "__main__":
    typer.run(main)
