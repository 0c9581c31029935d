"""The sentence about a damaged file names what to delete and the command that makes it again, and both are right."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from .checkout import fresh_clone, shell, snakemake

TABLES = Path("results/mine/tables")


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def mend(output: str, checkout: Path) -> list[str]:
    """Do what the last line of a command's output says, and return the paths that were deleted."""
    message = output.splitlines()[-1]
    [command] = re.findall(r"`lorabench run PRESET (.*?)`", message)
    [both] = re.findall(r"delete (\S+ and \S+) to have", message) or [command]
    deleted = both.split(" and ")
    for path in deleted:
        (shutil.rmtree if (checkout / path).is_dir() else Path.unlink)(checkout / path)
    shell(f"lorabench run mine.yaml {command}", checkout)
    return deleted


@pytest.mark.slow
def test_what_the_sentence_says_makes_a_damaged_file_again(raw_preset, tmp_path):
    clone = fresh_clone(tmp_path / "clone")
    raw_preset["datasets"]["instruct"]["train"] = 32
    (clone / "mine.yaml").write_text(yaml.safe_dump(raw_preset | {"execution": {"gflops": 0.01}}))
    snakemake(clone, str(TABLES / "claims.csv"), "--config", "preset=mine.yaml")
    claims = f"lorabench claims --preset mine.yaml --tables {TABLES} --out judged"
    save = "python workflow/scripts/saved_runs.py save --preset mine.yaml"
    before = pq.read_table(clone / TABLES / "curves.parquet")

    flip(clone / TABLES / "curves.parquet")
    assert mend(shell(f"! {claims}", clone), clone) == [str(TABLES / "curves.parquet")]
    shell(claims, clone)

    record = next((clone / "results/mine/runs").glob("*/record.json"))
    flip(record)
    deleted = mend(shell(f"! {save}", clone), clone)
    assert deleted[0] == str(record.parent.relative_to(clone))
    shell(save, clone)
    assert pq.read_table(clone / TABLES / "curves.parquet").sort_by("run_id") == before.sort_by("run_id")
