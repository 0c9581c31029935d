"""A clone of the repository to run Snakemake and other commands in."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from ..conftest import REPOSITORY

_SNAKEMAKE = (sys.executable, "-m", "snakemake", "--cores", "2")
_GIT = ("git", "-c", "user.name=tests", "-c", "user.email=tests@localhost")


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run([*_GIT, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def fresh_clone(folder: Path) -> Path:
    """Make a repository of the files that git knows in this one, changed and new files included, all committed."""
    names = git(REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        source, copy = REPOSITORY / name, folder / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy, follow_symlinks=False)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a clone")
    return folder


def _environment(commands: str | None = None) -> dict[str, str]:
    return os.environ | {"PATH": f"{commands or Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def shell(command: str, folder: Path, commands: str | None = None) -> str:
    """Run a command line in a shell and return what it printed; no hub is asked.

    Args:
        commands: the folder whose commands come first; by default that of the interpreter that runs the tests.
    """
    environment = _environment(commands) | {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": ""} if commands else {})
    status, output = _run(["bash", "-o", "pipefail", "-c", command], folder, environment)
    assert status == 0, f"{command}\n{output}"
    return output


def snakemake(checkout: Path, *arguments: str, fails: bool = False, commands: str | None = None) -> str:
    """Run Snakemake on two cores in the working copy, and return all it printed; `commands` as in `shell`."""
    status, text = _run([*_SNAKEMAKE, *arguments], checkout, _environment(commands))
    assert (status != 0) == fails, text
    return text


def started(checkout: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start Snakemake as leader of a group of processes; what it prints goes into the file `printed` of the folder."""
    with (checkout / "printed").open("w") as file:
        options = {"stdout": file, "stderr": file, "start_new_session": True}
        # A shell starts commands in the background with Ctrl-C ignored.
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen([*_SNAKEMAKE, *arguments], cwd=checkout, env=_environment(), **options)


def adapt_profile(checkout: Path, old: str, new: str) -> None:
    profile = checkout / "slurm/config.yaml"
    text = profile.read_text()
    assert text.count(old) == 1, old
    profile.write_text(text.replace(old, new))
