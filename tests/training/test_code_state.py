"""The record of the code that trained a run: the commit, and local changes byte for byte."""

from __future__ import annotations

import subprocess

from lorabench.training import context


def test_changes_that_are_no_utf_8_are_kept_byte_for_byte(tmp_path, monkeypatch):
    repository, patches = tmp_path / "repository", tmp_path / "patches"
    file = repository / "lorabench/note.txt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"before\n")
    monkeypatch.setattr(context, "_REPOSITORY", repository)
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for arguments in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", str(repository), *arguments], check=True)
    clean = context.code_state(patches)
    assert clean["git_sha"]
    assert clean["git_dirty_patch"] is None
    file.write_bytes("größer\r\n".encode("latin-1"))
    state = context.code_state(patches)
    assert state["git_sha"] == clean["git_sha"]
    assert b"+gr\xf6\xdfer\r\n" in (patches / f"{state['git_dirty_patch']}.patch").read_bytes()
