"""Start Snakemake on the packaged workflow, in the current folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lorabench.utils.files import SNAKEFILE, WORKFLOW

_CORES = ("--cores", "-c", "--jobs", "-j")


def snakemake_command(preset: str, options: Sequence[str]) -> list[str]:
    """Return the command line that runs a preset with the packaged workflow.

    Args:
        preset: a shipped preset's name, or the path of a YAML file.
        options: further options and targets for Snakemake. Without a number of cores, all cores are used. A shipped
            profile may be given by its name (`--profile slurm`), unless the current folder has a profile of that name.
    """
    parts = [part for option in options for part in _name_and_value(option)]
    given = [_shipped_profile(before, part) for before, part in zip(["", *parts], parts, strict=False)]
    if not any(option.partition("=")[0].startswith(_CORES) for option in given):
        given += ["--cores", "all"]
    # Snakemake takes the last --config only, so the preset joins a --config that the user gave.
    place = given.index("--config") + 1 if "--config" in given else len(given)
    config = [f"preset={preset}"] if "--config" in given else ["--config", f"preset={preset}"]
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE)),
        *given[:place],
        *config,
        *given[place:],
    ]


def _name_and_value(option: str) -> list[str]:
    """Return an option that is treated specially here in its long form, `--config=a=1` as `--config` and `a=1`."""
    name, equals, value = option.partition("=")
    if equals and name in ("--config", "--profile"):
        return [name, value]
    return ["--config"] if option == "-C" else [option]


def _shipped_profile(before: str, option: str) -> str:
    profile = WORKFLOW / "profiles" / option
    return str(profile) if before == "--profile" and not Path(option).exists() and profile.is_dir() else option


def start_snakemake(preset: str, options: Sequence[str]) -> None:
    """Replace this process by Snakemake.

    The workflow's rules call `lorabench`, so this environment's commands come first in PATH.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    command = snakemake_command(preset, options)
    os.execve(command[0], command, os.environ | {"PATH": path})
