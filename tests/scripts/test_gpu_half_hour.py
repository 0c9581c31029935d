"""Half an hour on a GPU, in its small form on the CPU: each piece in a process of its own, as on a fresh machine."""

import csv
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpu_half_hour import row_of_test
from lorabench.utils.gpus import processor

from ..conftest import REPOSITORY


def call(folder: Path, *options: str) -> str:
    """Do the next piece in a folder; return what it says."""
    command = [
        sys.executable,
        str(REPOSITORY / "workflow/scripts/gpu_half_hour.py"),
        "next",
        "out",
        "--small",
        *options,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.long
def test_the_pieces_follow_each_other_and_go_on_from_their_folder_alone(tmp_path):
    out = tmp_path / "out"
    for name in ("tests", "vllm_tests", "speeds"):
        call(tmp_path)
        table = rows(out / f"small_cpu_{name}.csv")
        assert {row["form"] for row in table} == {"small, on a CPU: says nothing about a GPU"}
        assert {row["device"] for row in table} == {processor()}
        if name == "speeds":
            assert {row["measure"] for row in table} == {"products", "elementwise", "attention", "steps"}
            assert all(float(row["value"]) > 0 for row in table)
        else:
            assert {row["result"] for row in table} <= {"passed", "skipped"}, table
            assert all(row["reason"] for row in table if row["result"] == "skipped")
    # Of the runs some are finished when they are stopped, or none.
    call(tmp_path, "--minutes", "0.5")
    archive = out / "small_cpu_runs_of_smoke.zip"
    files = zipfile.ZipFile(archive).namelist() if archive.exists() else []
    for folder in ("results", "paper_figures", ".snakemake"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    said = call(tmp_path, "--minutes", "30")
    done, _, expected = said.partition(" runs of smoke")[0].partition("/")
    assert done == expected
    assert len(list((tmp_path / "results/smoke/runs").glob("*/restored"))) >= len(files)
    assert zipfile.ZipFile(archive).testzip() is None
    assert not list(out.glob("gpu_*"))
    assert len(list(out.iterdir())) <= 8


def test_a_test_is_a_row_with_how_it_ended_and_why():
    cases = (
        '<testcase name="a" time="1.26"/>',
        '<testcase name="b" time="0"><skipped message="torch sees no GPU"/></testcase>',
        '<testcase name="c" time="2"><error message="of a fixture&#10;more"/></testcase>',
    )
    report = map(ElementTree.fromstring, cases)
    assert [list(row_of_test(case).values()) for case in report] == [
        ["a", "passed", "1.3", ""],
        ["b", "skipped", "0.0", "torch sees no GPU"],
        ["c", "failed", "2.0", "of a fixture"],
    ]
