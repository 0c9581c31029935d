"""A finished run is whole or named: a flipped bit, an edit or a file of another run is found by whoever reads it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.store import collect
from lorabench.store.io import read_rows, read_table, write_frame, write_table
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import CURVES, EVALS, RUN_TEST_LOSSES, CurvePoint, ExampleLoss
from lorabench.utils.files import write_json
from saved_runs import restore_runs, save_runs

from ..handmade import claims_table, evals_table, make_claim, make_eval, make_record

PLACES = 20
"""The bits that are flipped in each of ten kinds of files."""


@pytest.fixture
def finished(raw_preset, tmp_path, monkeypatch):
    """A plan, its layout, and the folders of the finished runs of its first sweep, which have weights."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(raw_preset))
    layout = Layout.of("mine.yaml")
    plan = make_plan(layout.preset)
    rng = np.random.default_rng(0)
    folders = []
    for run in plan.sweeps[0].grid():
        folder = RunFolder(layout.runs, run.run_id)
        with folder.finishing(make_record(run, final_valid_nll=2.5, final_test_nll=2.5)) as staging:
            staged = RunFolder(staging.parent, staging.name)
            curve = [CurvePoint(step, step, step, "train", "nll", rng.normal()) for step in range(20)]
            collect.write_entries(run.run_id, curve, CURVES, staged.curves)
            losses = [ExampleLoss(rng.normal(), 4) for _ in range(8)]
            collect.write_entries(run.run_id, losses, RUN_TEST_LOSSES, staged.test_losses)
            staged.weights.mkdir()
            (staged.weights / "adapter_model.safetensors").write_bytes(rng.bytes(500))
            (staged.weights / "README.md").write_text("A card.")
        folders.append(folder)
    return plan, layout, folders


def test_a_flipped_bit_is_named_in_all_of_200_places(finished):
    plan, layout, folders = finished
    folder, sweep, tables = folders[0], plan.sweeps[0], layout.tables()
    job = layout.job(plan.job_of[sweep])
    write_table(collect.sweep_table(folders, sweep), job)
    collect.collect([job], tables, plan, layout)
    write_frame(claims_table([make_claim("C1")]), "claims", tables)
    scores = Path("results/mine/evals/a.parquet")
    write_table(pa.Table.from_pandas(evals_table([make_eval("base", 0.5)]), schema=EVALS), scores)
    save_runs(plan, layout)
    [saved] = layout.saved_runs.iterdir()
    readers: dict[Path, Callable[[], object]] = {
        folder.record: folder.read_record,
        folder.curves: folder.read_nested,
        folder.test_losses: folder.read_nested,
        folder.weights / "adapter_model.safetensors": lambda: folder.check_files(folder.weights),
        job: lambda: collect.collect([job], Path("elsewhere"), plan, layout),
        **{
            tables / f"{name}.parquet": lambda name=name: read_table(tables, name)
            for name in ("runs", "curves", "test_losses", "claims")
        },
        scores: lambda: collect.collect_evals([scores], Path("elsewhere")),
        saved: lambda: restore_runs(plan, layout),
    }
    rng = np.random.default_rng(1)
    for path, read in readers.items():
        whole, named = path.read_bytes(), folder.final if path.is_relative_to(folder.final) else path
        # The last bytes are the length of a parquet file's footer.
        places = [*rng.choice(8 * len(whole), PLACES, replace=False), *range(8 * len(whole) - 64, 8 * len(whole), 7)]
        for place in places:
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(UserError, match=f"{named}.*(damaged|can't be read)|damaged .* delete {named}"):
                read()
        path.write_bytes(whole)
        read()
    assert len(readers) * PLACES >= 200
    # Index and estimates of time read rows without pandas.
    path = tables / "runs.parquet"
    path.write_bytes(path.read_bytes().replace(b"instruct", b"instruCt", 1))
    with pytest.raises(UserError, match=f"^{path} is damaged; delete it .*`lorabench run PRESET {path}`"):
        read_rows(tables, "runs", ["model"])


FAULTS: dict[str, Callable[[RunFolder, RunFolder], object]] = {
    "the checksum of record.json": lambda own, other: own.record.write_text(own.record.read_text().replace("2.5", "2")),
    "record.json is of another run": lambda own, other: shutil.copy(other.record, own.record),
    "curves.parquet is not the file": lambda own, other: shutil.copy(other.curves, own.curves),
    "test_losses.parquet is": lambda own, other: own.test_losses.unlink(),
    "weights/adapter_model.safetensors": lambda own, other: (own.weights / "adapter_model.safetensors").unlink(),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_what_is_edited_or_of_another_run_is_named(finished, reason):
    _, _, (folder, other, *_) = finished
    FAULTS[reason](folder, other)
    with pytest.raises(UserError, match=f"^run {folder.run_id} is damaged .{reason}.*; delete {folder.final} to have"):
        [folder.read_record(), folder.read_nested(), folder.check_files(folder.weights)]


def test_a_record_of_an_earlier_version_has_no_checksums_and_must_be_of_its_run(finished):
    _, _, (folder, *_) = finished
    record = folder.read_record()
    assert record.keys() == {"run_id", "spec", "outcome", "environment"}
    write_json(record, folder.record)
    before = folder.read_nested()
    folder.test_losses.unlink()
    assert folder.read_record() == record
    assert folder.read_nested()["curve"] == before["curve"]
    changes = ({"outcome": {}}, {"spec": []}, {"more": 1}, {"spec": record["spec"] | {"lr": 0.5}})
    for text in (*(json.dumps(record | change) for change in changes), "[]", "\xff", "[" * 100_000):
        folder.record.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=f"^run {folder.run_id} is damaged .*; delete {folder.final} to"):
            folder.read_record()


def test_the_file_of_a_damaged_runs_job_is_deleted_with_it(finished):
    plan, layout, folders = finished
    job = layout.job(plan.job_of[plan.sweeps[0]])
    write_table(collect.sweep_table(folders, plan.sweeps[0]), job)
    folders[0].record.write_text("{}")
    again = f"; delete {folders[0].final} and {job} to have it trained again, by `lorabench run PRESET {job}`"
    with pytest.raises(UserError, match=f"{re.escape(again)}$"):
        folders[0].read_record()


def test_a_restored_run_and_one_with_an_edited_card_are_whole(finished):
    plan, layout, (folder, *_) = finished
    before = folder.read_record(), folder.read_nested()
    (folder.weights / "README.md").write_text("Another card.")
    folder.check_files(folder.weights)
    save_runs(plan, layout)
    shutil.rmtree(layout.runs)
    restore_runs(plan, layout)
    assert (folder.read_record(), folder.read_nested()) == before
    assert set(json.loads(folder.record.read_text())["files"]) == {"curves.parquet", "test_losses.parquet", "restored"}


def test_a_file_with_a_checksum_is_a_plain_parquet_file(tmp_path):
    write_table(pa.table({"step": np.arange(5)}), tmp_path / "a.parquet")
    # What others make of it has no checksum that could be wrong.
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 3), tmp_path / "curves.parquet")
    assert len(read_table(tmp_path, "curves")) == 3
