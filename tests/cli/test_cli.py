"""The command line answers fast, a mistake is one sentence with exit status 2, and `lorabench run` starts Snakemake."""

import json
import os
import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lorabench.cli.commands import ADVICE, app, snakemake_command
from lorabench.utils.files import SNAKEFILE, WORKFLOW

MISTAKES = {
    "run": (("run", "lpatop"), "preset 'lpatop': no file "),
    "dataset": (("step", "dataset", "nope", "--preset", "smoke"), "dataset 'nope' is not in the preset; allowed: "),
    "job": (("step", "train", "nope", "--preset", "smoke"), "job 'nope' is not in the plan"),
    "no margins": (
        ("claims", "--tables", ".", "--out", ".", "--margins", "/nowhere.yaml"),
        "margins '/nowhere.yaml': there is no such file",
    ),
    "name of something else": (
        ("init", "evidence.yaml", "--model", "tiny", "--data", "d.jsonl"),
        "preset 'evidence': this is the name of something else in results/",
    ),
    "a file in place of a folder": (
        ("plan", "--preset", "smoke", "--out", "/dev/null/x.parquet"),
        "/dev/null can't be read or written: it is no folder",
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


def test_the_log_of_a_job_has_its_errors_with_their_tracebacks(tmp_path):
    log = tmp_path / "logs/job.log"
    result = CliRunner().invoke(app, ["step", "train", "nope", "--preset", "smoke", "--log", str(log)])
    assert result.stderr.count("\n") == 1
    first, *_, last = log.read_text().splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.endswith(result.stderr.strip().removeprefix("lorabench: "))


def test_a_name_starts_no_line_of_its_own_and_moves_no_cursor():
    result = CliRunner().invoke(app, ["plan", "--preset", "a\x1b[2J\n::error::b"])
    assert r"a\x1b[2J" in result.stderr
    assert result.stderr.replace("\n", "").isprintable()
    assert all(line.startswith("lorabench: ") for line in result.stderr.splitlines())


HEAVY = {"torch", "transformers", "peft", "datasets", "pandas", "pyarrow", "scipy", "numpy", "lm_eval", "lora_advice"}

# Runs a command, then prints the packages that it has imported.
CALL = """
import json, sys
from lorabench.cli.commands import app
app(sys.argv[1:], standalone_mode=False)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("arguments", [("--help",), ("plan", "--preset", "smoke")], ids=" ".join)
def test_help_and_plans_answer_at_once(tmp_path, arguments):
    # The subprocess imports this project from the same place as this process.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", CALL, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime
    packages = set(json.loads(done.stdout.splitlines()[-1]))
    assert "lorabench" in packages
    assert not packages & HEAVY
    assert arguments[0] != "--help" or all(name in done.stdout for name in ADVICE)
    # CPU time is measured, since tests share their machine; half a second is usual.
    assert seconds < 1.0


START = [sys.executable, "-P", "-m", "snakemake", "--snakefile", str(SNAKEFILE)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["--cores", "all", "--config", "preset=my.yaml"]),
        # Snakemake would take the last --config only.
        (["--config=other=3", "-j4"], ["-j4", "--config", "preset=my.yaml", "other=3"]),
    ],
)
def test_options_are_passed_on(options, expected):
    assert snakemake_command("my.yaml", options) == START + expected


def test_a_profile_of_the_folder_goes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = str(WORKFLOW / "profiles/slurm")
    assert snakemake_command("core", ["--profile", "slurm"])[6:8] == ["--profile", profile]
    (tmp_path / "slurm").mkdir()
    assert snakemake_command("core", ["--profile", "slurm"])[6:8] == ["--profile", "slurm"]


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
