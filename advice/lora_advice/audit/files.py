"""The runs that files and folders state, what is found of each, and which files were not understood."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_advice.adapter_config import NAME
from lora_advice.audit.config import Task, TrainingConfig
from lora_advice.audit.readers import (
    adapter,
    axolotl,
    llamafactory,
    openrlhf,
    prime_rl,
    swift,
    torchtune,
    trl,
    verl,
)
from lora_advice.audit.readers.options import frameworks
from lora_advice.errors import UserError
from lora_advice.finding import Finding
from lora_advice.limits import SECONDS, SECONDS_WITH_HUB, in_limits

READERS: dict[str, Callable[[Path, str], list[TrainingConfig]]] = {
    "peft": adapter.read,
    "axolotl": axolotl.read,
    "torchtune": torchtune.read,
    "llamafactory": llamafactory.read,
    "verl": verl.read,
    "swift": swift.read,
    "openrlhf": openrlhf.read,
    "prime_rl": prime_rl.read,
    "trl": trl.read,
}
"""By format; of those whose marks in `frameworks.yaml` a file has, the first reads it."""

_SUFFIXES = {
    **dict.fromkeys((".yaml", ".yml", ".json"), "yaml"),
    **dict.fromkeys((".sh", ".bash", ".slurm", ".sbatch"), "script"),
    ".py": "python",
    ".toml": "toml",
}
"""The kinds of files."""
LARGEST = 1_000_000  # bytes; what is larger is data, not a configuration
_SKIPPED = frozenset({"node_modules", "__pycache__", "site-packages", "venv"})


@dataclass(frozen=True)
class NotRead:
    """A file that was not read."""

    path: str
    reason: str  # a sentence in which the file is `it`


def read_paths(
    paths: Sequence[Path],
    file_format: str | None = None,
    check: Callable[[TrainingConfig], list[Finding]] = lambda config: [],
    skip_unknown: bool = False,
    hub: bool = False,
    task: Task | None = None,
) -> tuple[list[TrainingConfig], list[Finding], list[NotRead]]:
    """Return the runs that files state, by path and name, what `check` finds of each alone, and the files not read.

    `hub` says whether a check may wait for the hub; the other arguments and errors are those of `audit`.
    """
    if file_format is not None and file_format not in READERS:
        raise UserError(f"--format {file_format}: allowed: {', '.join(READERS)}")
    files = dict[str, tuple[Path, bool]]()
    configs, findings, not_read = list[TrainingConfig](), list[Finding](), list[NotRead]()
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: there is no such file or folder")
        for file in _files(path, not_read):
            files.setdefault(os.path.realpath(file), (file, file == path and not skip_unknown))

    def answer(item: tuple[Path, bool]) -> dict[str, Any]:
        runs = [replace(run, task=run.task or task) for run in _read(item[0], file_format, named=item[1])]
        found = [finding for run in runs for finding in check(run)]
        return {"configs": [*map(asdict, runs)], "findings": [*map(asdict, found)]}

    answers = in_limits(answer, list(files.values()), SECONDS_WITH_HUB if hub else SECONDS)
    for (file, _), said in zip(files.values(), answers, strict=True):
        if isinstance(said, UserError):
            not_read.append(NotRead(file.as_posix(), str(said)))
            continue
        for plain in said["configs"]:
            # In plain data, tuples have become lists.
            fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
            fields["findings"] = tuple(Finding(**finding) for finding in plain["findings"])
            configs.append(TrainingConfig(**fields))
        findings.extend(Finding(**finding) for finding in said["findings"])
    return configs, findings, not_read


def _files(path: Path, not_read: list[NotRead]) -> Iterator[Path]:
    """Yield the file that a path names, or the files of its folder; adds what is neither, or can't be listed."""
    if os.path.isfile(path):
        yield path
        return
    if not os.path.isdir(path):
        not_read.append(NotRead(path.as_posix(), "it is neither a file nor a folder"))

    def unlisted(error: OSError) -> None:
        not_read.append(NotRead(Path(error.filename).as_posix(), f"the folder cannot be listed: {error.strerror}"))

    for folder, folders, names in os.walk(path, onerror=unlisted):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            # A broken link and a pipe are no files.
            if file.suffix in _SUFFIXES and os.path.isfile(file) and os.path.getsize(file) <= LARGEST:
                yield file


def _read(file: Path, file_format: str | None, named: bool) -> list[TrainingConfig]:
    try:
        if file.stat().st_size > LARGEST:
            raise UserError(f"it has more than {LARGEST / 1e6:g} MB, so it is no configuration")
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}") from error
    formats = [name for name in READERS if file_format in (None, name) and recognizes(name, file, text)]
    if named and file_format is not None:
        formats = [file_format]
    for name in formats:
        if configs := READERS[name](file, text):
            return configs
    if named:
        unknown = f"it is of no format that is known: {', '.join(READERS)}; --format names one"
        raise UserError(f"it states no training run of {' or '.join(formats)}" if formats else unknown)
    return []


def recognizes(name: str, file: Path, text: str) -> bool:
    """Return whether a file has the marks of a format."""
    is_script = not file.suffix and re.match(r"#!.*\b(ba|z|k|da)?sh\b", text)
    kind = "adapter" if file.name == NAME else "script" if is_script else _SUFFIXES.get(file.suffix)
    marks = frameworks()[name]["marks"].get(kind)
    return marks is not None and all(re.search(mark, text, re.MULTILINE) for mark in marks)
