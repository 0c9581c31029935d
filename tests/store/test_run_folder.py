"""Files and folders of runs are written whole or not at all."""

from __future__ import annotations

import math

import pytest

from lorabench.store.run_folder import RunFolder
from lorabench.utils.files import atomic_path, write_json


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    target = tmp_path / "value.json"
    write_json({"a": 1}, target)

    def fail():
        with atomic_path(target) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_a_number_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"loss": math.nan}, tmp_path / "value.json")
    assert not list(tmp_path.iterdir())


def test_a_run_becomes_visible_when_it_is_whole(tmp_path):
    folder = RunFolder(tmp_path, "abc")
    folder.partial.mkdir()
    with folder.finishing({}):
        assert not folder.done()
    assert folder.done()
    assert [path.name for path in tmp_path.iterdir()] == ["abc"]
