"""The table of runs to which runs that end at the same time add their rows."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from lora_advice import files
from lora_advice.errors import UserError
from lora_advice.runs_table import add_row, check_table


def add_many(folder: Path, name: str) -> None:
    for number in range(20):
        add_row(folder, {"run_id": f"{name}-{number}", "lr": 1e-4})


def test_rows_are_added_and_replaced_and_columns_of_others_are_kept(tmp_path):
    table = tmp_path / "new" / "runs.csv"
    assert not add_row(table.parent, {"run_id": "a", "model": 'x, "y"\nz', "rank": None, "lr": 1e-4})
    assert not add_row(table.parent, {"run_id": "b", "lr": 0.1 + 0.2, "final_test_nll": 2.0})
    assert add_row(table.parent, {"run_id": "a", "lr": 3e-4})
    header = "run_id,model,rank,lr,final_test_nll\n"
    assert table.read_text() == f"{header}b,,,0.30000000000000004,2.0\na,,,0.0003,\n"


def test_processes_lose_no_rows_of_each_other(tmp_path):
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=add_many, args=(tmp_path, name)) for name in "abc"]
    for other in others:
        other.start()
    for other in others:
        other.join()
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert sorted(lines[1:]) == sorted(f"{name}-{number},0.0001" for name in "abc" for number in range(20))


def test_a_process_that_is_killed_leaves_the_table_whole_and_the_lock_free(tmp_path):
    add_row(tmp_path, {"run_id": "a"})
    child = os.fork()
    if child == 0:
        # Killed with the lock, and half of the new table written.
        files.os.replace = lambda *paths: time.sleep(60)
        add_row(tmp_path, {"run_id": "b"})
    while not list(tmp_path.glob(".*.partial")):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "runs.csv").read_text() == "run_id\na\n"
    add_row(tmp_path, {"run_id": "c"})
    assert (tmp_path / "runs.csv").read_text() == "run_id\na\nc\n"


def test_what_is_no_table_of_runs_is_left_alone_and_named(tmp_path):
    table = tmp_path / "runs.csv"
    for text, message in (
        ("model,lr\nm,1\n", "runs.csv is no table of runs: it needs a column run_id"),
        ("run_id,lr\na,1,2\n", "in each row a cell for each column"),
        ('run_id,lr\n"a,1\n', "runs.csv can't be read as a table: unexpected end of data"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            check_table(tmp_path)
        assert table.read_text() == text
    table.unlink()
    (tmp_path / "runs.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="has a table runs.parquet, which counts in place of runs.csv"):
        check_table(tmp_path)
    with pytest.raises(UserError, match=r"runs.parquet/.runs.lock can't be locked: (Not a directory|File exists)"):
        check_table(tmp_path / "runs.parquet")
