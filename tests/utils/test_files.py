"""A file that can't be written is one sentence that names it, and nothing that is no file is replaced."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from lorabench.errors import UserError
from lorabench.store.io import write_table
from lorabench.utils.files import atomic_path, write_json


@contextmanager
def without_privileges():
    """Within the context permissions hold for this process, as they do not for root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_what_is_no_regular_file_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(UserError, match=f"^{path} can't be written: it exists and is no regular file$"):
            write_json({}, path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_impossible_paths_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for name, named, reason in [
        ("file/x.json", "file", "it is no folder"),
        ("file/new/x.json", "file/new", "Not a directory"),
        ("x" * 300, "x" * 300, "File name too long"),
    ]:
        with pytest.raises(UserError, match=f"^{tmp_path / named} can't be read or written: {reason}$"):
            write_json({}, tmp_path / name)
    with pytest.raises(UserError, match="^/proc/new/x.json can't be written: no folder can be made there$"):
        write_json({}, Path("/proc/new/x.json"))


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    write_json({}, tmp_path / ("x" * 255))
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


@pytest.mark.parametrize("write", [lambda path: write_json({}, path), lambda path: write_table(pa.table({}), path)])
def test_no_permission_is_one_sentence(write, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("locked")
    monkeypatch.chdir(folder)
    folder.chmod(0o555)
    with without_privileges(), pytest.raises(UserError, match=r"can't be read or written: Permission denied$"):
        write(folder / "x.json")
    folder.chmod(0o755)
    assert not list(folder.iterdir())


def test_a_missing_file_may_be_a_mistake_of_the_program_s_and_is_no_sentence(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x.json"):
        (tmp_path / "nowhere").read_text()
