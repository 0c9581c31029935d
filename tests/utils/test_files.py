"""A file that can't be written is one sentence that names it, and nothing that is no file is replaced."""

import math
import os
import stat
from pathlib import Path

import pytest

from lorabench.errors import UserError
from lorabench.utils.files import atomic_path, write_json


def test_what_is_no_regular_file_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(UserError, match=f"^{path} can't be written: it exists and is no regular file$"):
            write_json({}, path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    target = tmp_path / "value.json"
    write_json({"a": 1}, target)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"loss": math.nan}, target)
    with pytest.raises(TypeError), atomic_path(target) as partial:
        len(partial.write_text("half"))
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


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
