"""Commands in processes that are forked from one that has imported torch and other libraries, so they start at once."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("lorabench.cli.commands", "lorabench.training.sft", "lorabench.training.rl.trainer"),
        *("lorabench.claims.judge", "lorabench.custom.preset", "snakemake.cli"),
        *("peft", "pyarrow.dataset", "scipy.stats", "transformers.models.llama.modeling_llama"),
    ]
)


def run_forked(command: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run a command of lorabench or Snakemake; return its exit status and what it printed."""
    with tempfile.NamedTemporaryFile("r") as output:
        process = start_forked(command, folder, output.name)
        process.join(300)
        assert process.exitcode is not None, output.read()
        return process.exitcode, output.read()


def start_forked(command: Sequence[str], folder: Path, output: str | Path) -> BaseProcess:
    """Start a command of lorabench or Snakemake, without a hub, that prints into a file."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    process = FORKS.Process(target=_run, args=(command, folder, environment, output))
    process.start()
    return process


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str], output: str | Path) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    redirect_output(output)
    sys.argv = list(command)
    if command[0] == "snakemake":
        from snakemake.cli import main

        main()
    elif command[0] == "lora-advice":
        from lora_advice.cli import run

        run()
    else:
        from lorabench.cli.commands import app

        app()


def redirect_output(path: str | Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
