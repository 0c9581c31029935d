"""The command line with which `lorabench run` starts Snakemake."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from lorabench.cli import app
from lorabench.cli.commands import snakemake_command
from lorabench.utils.files import SNAKEFILE, WORKFLOW

START = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["--cores", "all", "--config", "preset=my.yaml"]),
        (["--dry-run", "--cores=2"], ["--dry-run", "--cores=2", "--config", "preset=my.yaml"]),
        (["-c1", "report.html"], ["-c1", "report.html", "--config", "preset=my.yaml"]),
        # Snakemake would take the last --config only.
        (["--config=other=3", "-j4"], ["-j4", "--config", "preset=my.yaml", "other=3"]),
        (["-C", "a=1", "b=2", "-j", "4", "-C", "c=3"], ["-j", "4", "--config", "preset=my.yaml", "a=1", "b=2", "c=3"]),
    ],
)
def test_options_are_passed_on(options, expected):
    assert snakemake_command("my.yaml", options) == START + expected


def test_a_profile_of_the_folder_goes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = str(WORKFLOW / "profiles/slurm")
    assert snakemake_command("core", ["--profile", "slurm"])[5:7] == ["--profile", profile]
    assert snakemake_command("core", ["--profile=slurm"])[5:7] == ["--profile", profile]
    (tmp_path / "slurm").mkdir()
    assert snakemake_command("core", ["--profile", "slurm"])[5:7] == ["--profile", "slurm"]


def test_an_unknown_preset_is_one_sentence():
    result = CliRunner().invoke(app, ["run", "lpatop"])
    assert result.exit_code == 2
    assert result.stderr.startswith("lorabench: preset 'lpatop': no file ")
    assert result.stderr.count("\n") == 1
