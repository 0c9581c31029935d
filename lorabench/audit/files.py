"""The configurations in files and folders, and which files were not understood."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lorabench.audit.config import TrainingConfig
from lorabench.audit.readers import adapter, axolotl, llamafactory, nemo_rl, torchtune, trl, verl
from lorabench.errors import UserError

READERS: dict[str, ModuleType] = {
    "peft": adapter,
    "axolotl": axolotl,
    "torchtune": torchtune,
    "llamafactory": llamafactory,
    "verl": verl,
    "nemo-rl": nemo_rl,
    "trl": trl,
}
"""By format; of those that recognize a file, the first reads it."""

SUFFIXES = frozenset({".yaml", ".yml", ".json", ".py", ".ipynb", ".sh", ".bash", ".slurm", ".sbatch"})
LARGEST = 1_000_000
"""Bytes; what is larger is data, not a configuration."""
_SKIPPED = frozenset({"node_modules", "__pycache__", "site-packages", "venv"})


@dataclass(frozen=True)
class NotRead:
    """A file that was not read."""

    path: str
    reason: str
    """A sentence in which the file is `it`."""


@dataclass(frozen=True)
class Reading:
    """What was found at some paths."""

    configs: list[TrainingConfig]
    not_read: list[NotRead]
    """Files that the user named, and files of a known format, that could not be read."""
    files: int
    """Number of files that were looked at."""


def read_paths(paths: Sequence[Path], file_format: str | None = None) -> Reading:
    """Return the training runs that files state, in the order of the paths and then by name.

    Args:
        paths: files and folders.
        file_format: read files as this format, and of folders only what looks like it; by default each is recognized.

    Raises:
        UserError: a path or the format is not there.
    """
    if file_format is not None and file_format not in READERS:
        raise UserError(f"--format {file_format}: allowed: {', '.join(READERS)}")
    configs, not_read, seen = list[TrainingConfig](), list[NotRead](), set[Path]()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder")
        for file in _files(path):
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                configs.extend(_read(file, file_format, named=file == path))
            except UserError as error:
                not_read.append(NotRead(file.as_posix(), str(error)))
    return Reading(configs, not_read, len(seen))


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            # A broken link and a pipe are no files.
            if file.suffix in SUFFIXES and file.is_file() and file.stat().st_size <= LARGEST:
                yield file


def _read(file: Path, file_format: str | None, named: bool) -> list[TrainingConfig]:
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(f"it has more than {LARGEST / 1e6:g} MB, so it is no configuration")
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}") from error
    formats = [name for name in READERS if file_format in (None, name) and READERS[name].matches(file, text)]
    if named and file_format is not None:
        formats = [file_format]
    for name in formats:
        if configs := READERS[name].read(file, file.as_posix(), text):
            return list(configs)
    if named and not formats:
        raise UserError(f"it is of no format that is known: {', '.join(READERS)}; --format names one")
    if named:
        raise UserError(f"it states no training run of {' or '.join(formats)}")
    return []
