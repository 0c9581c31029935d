"""The Hugging Face hub: jobs with a network fetch what a preset needs once, and all other jobs read the cache offline.

A revision that may move (`main`, a tag) is pinned for all of a preset's results to the commit that it pointed to when
it was first fetched. The file in `results/<preset>/pins/` that holds it is no output of a rule, so it stays when the
workflow makes its outputs again. A run's id holds the revision that the preset names, so a plan needs no network; its
record holds the commit, and runs of different commits are never mixed (`lorabench/training/job.py`).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from lorabench.errors import UserError
from lorabench.utils.files import write_json

_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Seconds in which a request that a user waits for must be answered.
_LOOK_UP_SECONDS = 2.0


@dataclass(frozen=True)
class WantedRepository:
    """A repository to fetch, at the revision that a preset names."""

    kind: Literal["model", "dataset"]
    id: str
    revision: str
    parts: tuple[tuple[str | None, str], ...] = ()
    """The parts of a dataset to fetch, each a configuration (None for the default) and a split."""
    code: bool = False
    """Whether to fetch a model's Python files too."""

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


@dataclass(frozen=True)
class FetchedRepository:
    """A repository as it was fetched into the hub's cache."""

    kind: Literal["model", "dataset"]
    id: str
    commit: str
    parts: dict[str, list[str]]
    """The names of a dataset's files by part, `configuration/split` or `split`."""

    def data_files(self, config: str | None, split: str) -> list[Path]:
        """Return the local files of a part of a dataset; UserError if one is not, or no longer, in the cache."""
        from huggingface_hub import constants, try_to_load_from_cache

        files = []
        for name in self.parts[_part_name(config, split)]:
            local = try_to_load_from_cache(self.id, name, constants.HF_HUB_CACHE, self.commit, self.kind)
            if not isinstance(local, str):
                place = f"{self.kind} {self.id} is not in the hub's cache {constants.HF_HUB_CACHE}"
                raise UserError(f"{name} of {place}; fetch it again")
            files.append(Path(local))
        return files


@cache
def read_fetched(path: Path) -> dict[str, FetchedRepository]:
    """Read the file that `fetch` wrote: the fetched repositories by their id; UserError if nothing was fetched yet."""
    if not path.is_file():
        raise UserError(
            f"not fetched from the hub yet: no {path}; run `lorabench step fetch-model` or `lorabench step fetch-data`"
        )
    made = [FetchedRepository(**entry) for entry in json.loads(path.read_text())]
    return {repository.id: repository for repository in made}


def fetch_repositories(wanted: list[WantedRepository], pins: Path, out: Path) -> None:
    """Download repositories into the hub's cache and describe them in the JSON file `out` for `read_fetched`.

    The folder `pins` has the files that pin revisions to commits. UserError says that a repository can't be downloaded
    or lacks a .safetensors file or a wanted part.
    """
    from huggingface_hub import snapshot_download

    fetched = []
    for repository in wanted:
        with _explained(repository):
            commit, parts = _pinned(repository, pins), dict[str, list[str]]()
            download: dict[str, Any] = {"repo_id": repository.id, "repo_type": repository.kind, "revision": commit}
            if repository.kind == "dataset":
                parts = {_part_name(*part): _part_files(repository, commit, *part) for part in repository.parts}
                download["allow_patterns"] = list(chain(*parts.values()))
            else:
                download["allow_patterns"] = [*_MODEL_FILES, *(["*.py"] if repository.code else [])]
                # Some repositories hold the same weights in other formats in folders.
                download["ignore_patterns"] = ["*/*"]
                files = snapshot_download(**download, dry_run=True)
                if not any(file.filename.endswith(".safetensors") for file in files):
                    raise UserError(
                        f"{repository} has no .safetensors file at {commit}; pickled weights are not loaded"
                    )
            snapshot_download(**download)
        fetched.append(asdict(FetchedRepository(repository.kind, repository.id, commit, parts)))
    write_json(fetched, out)
    read_fetched.cache_clear()


def look_up(wanted: WantedRepository, file: str | None = None) -> str:
    """Return the text of a small file of a repository from the hub's cache or the hub, or what the hub says of it.

    UserError says that it is not on the hub, or that the hub does not answer within two seconds.
    """
    from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = f"{constants.ENDPOINT}/api/{wanted.kind}s/{wanted.id}"
    if file is not None:
        cached = try_to_load_from_cache(wanted.id, file, revision=wanted.revision, repo_type=wanted.kind)
        if isinstance(cached, str):
            return Path(cached).read_text(encoding="utf-8")
        url = hf_hub_url(wanted.id, file, revision=wanted.revision, repo_type=wanted.kind)
    with _explained(wanted):
        response = get_session().get(url, headers=build_hf_headers(), timeout=_LOOK_UP_SECONDS)
        hf_raise_for_status(response)
        return response.text


def _pinned(wanted: WantedRepository, pins: Path) -> str:
    """Return the commit that a revision is pinned to; the first call looks it up."""
    if _COMMIT.fullmatch(wanted.revision):
        return wanted.revision
    from huggingface_hub import HfApi

    name = "--".join([f"{wanted.kind}s", *wanted.id.split("/"), *wanted.revision.split("/")])
    pin = pins / f"{name}.txt"
    if not pin.is_file():
        commit = HfApi().repo_info(wanted.id, repo_type=wanted.kind, revision=wanted.revision).sha
        pins.mkdir(parents=True, exist_ok=True)
        # Two datasets of one repository may be fetched at the same time; the first to link its file decides.
        with tempfile.NamedTemporaryFile("w", dir=pins, suffix=".partial") as file, suppress(FileExistsError):
            file.write(f"{commit}\n")
            file.flush()
            os.link(file.name, pin)
    return pin.read_text().strip()


def _part_name(config: str | None, split: str) -> str:
    return f"{config}/{split}" if config else split


def _part_files(wanted: WantedRepository, commit: str, config: str | None, split: str) -> list[str]:
    """Return the names of a part's files, which the datasets library finds by the repository's card and file names."""
    import datasets
    from huggingface_hub import HfApi

    try:
        builder = datasets.load_dataset_builder(wanted.id, name=config, revision=commit)
    except datasets.exceptions.DatasetNotFoundError:
        # The library does not say why; the hub's client raises an error that does.
        HfApi().auth_check(wanted.id, repo_type="dataset")
        raise
    except ValueError as error:
        raise UserError(f"{wanted} has no configuration {config!r}: {str(error).strip().splitlines()[0]}") from error
    files = builder.config.data_files or {}
    if split not in files:
        raise UserError(f"{wanted} has no split {split!r}; allowed: {', '.join(map(str, files))}")
    return [str(file).removeprefix(f"hf://datasets/{wanted.id}@{commit}/") for file in files[split]]


@contextmanager
def _explained(wanted: WantedRepository) -> Iterator[None]:
    """Turn an error of the hub's client that the user can correct into a UserError of one sentence."""
    from huggingface_hub import constants, errors

    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        failed = f"{wanted} can't be fetched at {wanted.revision} from {constants.ENDPOINT}: {lines[0]}"
        page = f"{constants.ENDPOINT}/{'datasets/' if wanted.kind == 'dataset' else ''}{wanted.id}"
        gated = f"is gated: ask for access on {page}, then log in with `hf auth login` or set HF_TOKEN"
        unknown = "is not on the hub, or is private and needs a token (`hf auth login` or HF_TOKEN)"
        # The order matters: GatedRepoError is a RepositoryNotFoundError, and all errors of the hub are errors of HTTP.
        reasons: list[tuple[Any, str]] = [
            (errors.GatedRepoError, f"{wanted} {gated}"),
            (errors.RevisionNotFoundError, f"{wanted} has no revision {wanted.revision!r}"),
            (errors.RepositoryNotFoundError, f"{wanted} {unknown}"),
            # That of the client's HTTP library, which differs between versions of the client.
            (errors.HTTPError, failed),  # type: ignore[attr-defined]
            (OSError, failed),
        ]
        for kind, sentence in reasons:
            if isinstance(error, kind):
                raise UserError(sentence) from error
        raise
