"""The command line answers fast, and a mistake is one sentence with exit status 2."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lorabench.cli import app


def lorabench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "lorabench.cli", *arguments], capture_output=True, text=True, check=False
    )


MISTAKES = {
    "preset": (("plan", "--preset", "nope"), "preset 'nope': no file"),
    "dataset": (
        ("step", "dataset", "nope", "--preset", "smoke"),
        "dataset 'nope' is not in the preset; allowed: instruct",
    ),
    "not gguf": (("step", "convert", "tiny", "--preset", "smoke"), "model 'tiny' is of kind 'tiny'; only gguf models"),
    "job": (("step", "train", "nope", "--preset", "smoke"), "job 'nope' is not in the plan"),
    "figure": (("figure", "nope", "--tables", ".", "--out", "."), "figure 'nope': allowed: verdicts, fig1_envelopes"),
    "two margins": (
        ("claims", "--tables", ".", "--out", ".", "--preset", "smoke", "--margins", "m.yaml"),
        "--preset and --margins: give one of them",
    ),
    "no margins": (
        ("claims", "--tables", ".", "--out", ".", "--margins", "/nowhere.yaml"),
        "margins '/nowhere.yaml': there is no such file",
    ),
    "noise without a source": (
        ("claims", "--tables", ".", "--out", ".", "--noise-sd", "0.004", "--noise-dof", "4"),
        "--noise-sd needs --noise-dof and --noise-source",
    ),
    "tables": (
        ("claims", "--tables", "/nowhere", "--out", "."),
        "no table runs, curves, compute, counts, evals or test_losses (.parquet or .csv) in /nowhere",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_sentence(mistake, monkeypatch):
    arguments, message = mistake
    # The command that makes a dataset replaces its process by one with fixed hashes, unless it has them.
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"lorabench: {message}")
    assert result.stderr.count("\n") == 1


def test_a_mistake_in_a_process_of_its_own_has_no_traceback():
    arguments, message = MISTAKES["preset"]
    result = lorabench(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"lorabench: {message}")
    assert result.stderr.count("\n") == 1


def test_plan_prints_a_table():
    result = lorabench("plan", "--preset", "smoke")
    assert result.returncode == 0
    for text in ("experiment", "runs", "tokens", "minutes", "rank", "total"):
        assert text in result.stdout


@pytest.mark.parametrize("arguments", [("--help",), ("plan", "--preset", "laptop")])
def test_answers_at_once(arguments, tmp_path, monkeypatch):
    # A finished preset in the folder would be read, which takes longer.
    monkeypatch.chdir(tmp_path)

    def cpu_seconds():
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    # CPU time is measured, since tests share their machine; half a second is usual.
    start = cpu_seconds()
    assert lorabench(*arguments).returncode == 0
    assert cpu_seconds() - start < 1.0


@pytest.mark.slow
def test_a_dataset_is_the_same_whatever_the_hashes_of_text(tmp_path, raw_preset, write_preset):
    preset = write_preset(raw_preset)
    contents = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-m", "lorabench.cli", "step", "dataset", "instruct", "--preset", preset]
        subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
        [path] = (folder / "results/mine/data").iterdir()
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
