"""Presets exported as a dataset: tables come back as they were; the card has exactly their columns."""

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from export import export
from lorabench.errors import UserError
from lorabench.store.io import read_table, write_frame
from lorabench.store.layout import Layout
from lorabench.store.schemas import SCHEMAS

from ..handmade import claims_table, curves_of, evals_table, make_claim, make_eval, make_sweep, runs_table

RUNS = runs_table(make_sweep(None) + make_sweep(16))
TABLES = {
    "runs": RUNS,
    "curves": curves_of(RUNS),
    "evals": evals_table([make_eval(16, 0.5)]),
    "claims": claims_table([make_claim("B1", run_ids=["a", "b"])]),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the preset smoke as if it had been run here; return the folder of its dataset."""
    monkeypatch.chdir(tmp_path)
    for name, frame in TABLES.items():
        write_frame(frame, name, Layout.of("smoke").tables())
    return tmp_path / "dataset"


def test_own_tables_come_back_from_the_files_and_from_datasets_and_the_card_has_their_columns(
    own: Path, tmp_path: Path
):
    from datasets import load_dataset

    rows = {"runs": len(RUNS), "curves": len(TABLES["curves"]), "evals": 1, "claims": 1}
    assert export([], own) == {"smoke": rows}
    assert json.loads((own / "smoke/provenance.json").read_text())["runs"] == len(RUNS)
    for name in TABLES:
        before, after = (read_table(folder, name) for folder in (Layout.of("smoke").tables(), own / "smoke"))
        assert (after.pop("preset") == "smoke").all()
        if name == "runs":
            # The names of machines are private.
            assert before["host"].notna().all()
            before["host"] = None
        pd.testing.assert_frame_equal(after, before, check_dtype=False)
        loaded = load_dataset(str(own), name, split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.column_names == ["preset", *SCHEMAS[name].names]
        assert loaded.to_list() == pq.read_table(own / "smoke" / f"{name}.parquet").to_pylist()
    _, head, body = (own / "README.md").read_text().split("---\n", 2)
    assert [config["config_name"] for config in yaml.safe_load(head)["configs"]] == list(TABLES)
    sections = dict(section.split("\n", 1) for section in body.split("\n## ")[1:])
    for name in TABLES:
        cells = [line.split("`")[1] for line in sections[name].splitlines() if line.startswith("| `")]
        assert cells == ["preset", *SCHEMAS[name].names]


def test_nothing_is_written_where_there_are_no_tables_or_into_a_folder_with_others(own: Path):
    with pytest.raises(UserError, match=r"preset laptop has no tables in results/laptop/tables; finish it first"):
        export(["smoke", "laptop"], own)
    assert not own.exists()
    own.mkdir()
    (own / "notes.txt").touch()
    with pytest.raises(UserError, match="dataset is not empty; export into a new folder"):
        export(["smoke"], own)
