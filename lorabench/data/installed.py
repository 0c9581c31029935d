"""The Python sources of installed packages, as their installation recorded them: read as text, never imported or run.

A distribution's file RECORD lists the SHA-256 of each installed file. Its hashes identify the content without reading
the files, and each file that is read is compared with its hash.
"""

from __future__ import annotations

import base64
import csv
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from lorabench.errors import UserError
from lorabench.utils.files import digest

_SKIPPED_FOLDERS = {"tests", "testing", "test", "_vendor", "vendored", "externals", "array_api_compat", "models"}
"""Folders of tests, of copies of other packages, and (`models`) of the near-copies of one model's code for the next."""

_BUILD_FILES = {"__config__.py"}
"""Files that describe the machine that built a wheel, so that they differ between wheels of one version."""


@dataclass(frozen=True)
class InstalledPackage:
    """An installed distribution: its name, version and licence, and the SHA-256 of each of its sources by path."""

    name: str
    version: str
    licence: str
    sources: tuple[tuple[str, str], ...]
    root: Path

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield the path and the text of each source, in the order of the paths.

        Raises:
            UserError: a file can't be read, or is not what was installed.
        """
        for path, sha256 in self.sources:
            try:
                content = (self.root / path).read_bytes()
            except OSError as error:
                raise UserError(f"{path} of package {self.name} can't be read: {error.strerror or error}") from error
            if _encoded(content) != sha256:
                raise UserError(
                    f"{path} of package {self.name} {self.version} was changed after it was installed; install the "
                    "package again"
                )
            yield path, content.decode(errors="replace")


def installed_packages(names: Iterable[str]) -> list[InstalledPackage]:
    """Return the installed packages of some names, in that order.

    Raises:
        UserError: packages are not installed, or the record of an installation lists no source.
    """
    found = {name: _installed(name) for name in names}
    missing = [name for name, package in found.items() if package is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; install lorabench with all its dependencies")
    return [package for package in found.values() if package is not None]


def sources_digest(packages: Iterable[InstalledPackage]) -> str:
    """Return the hash of the names, versions and sources of packages."""
    return digest([[package.name, package.version, package.sources] for package in packages])


@cache
def _installed(name: str) -> InstalledPackage | None:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    lines = csv.reader((found.read_text("RECORD") or "").splitlines())
    recorded = {line[0]: line[1] for line in lines if len(line) == 3 and _is_source(PurePosixPath(line[0]))}
    sources = tuple(sorted((path, value.removeprefix("sha256=")) for path, value in recorded.items()))
    if not sources or not all(value.startswith("sha256=") for value in recorded.values()):
        raise UserError(
            f"the installation of package {name} {found.version} has no record of its sources with their SHA-256; "
            "install it from a wheel"
        )
    return InstalledPackage(name, found.version, _licence(found), sources, Path(str(found.locate_file(""))))


def _is_source(path: PurePosixPath) -> bool:
    if path.suffix != ".py" or path.is_absolute() or ".." in path.parts or path.name in _BUILD_FILES:
        return False
    return not _SKIPPED_FOLDERS.intersection(path.parts[:-1]) and not path.name.startswith(("test_", "conftest"))


def _licence(found: Distribution) -> str:
    """Return the licence that a distribution's metadata state, in one line."""
    stated = found.metadata
    if "License-Expression" in stated:
        return stated["License-Expression"]
    classifiers = [text for text in stated.get_all("Classifier") or [] if text.startswith("License ::")]
    if classifiers:
        return ", ".join(text.rpartition(" :: ")[2] for text in classifiers)
    lines = (stated.get_all("License") or [""])[0].strip().splitlines()
    return lines[0].strip() if lines else "not stated"


def _encoded(content: bytes) -> str:
    """Return the SHA-256 as RECORD writes it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
