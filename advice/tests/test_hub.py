"""Looking a model's small file up on the hub, whose client is replaced."""

import sys

import pytest
from lora_advice import models
from lora_advice.errors import UserError


def test_a_file_is_fetched_or_one_sentence_says_why_not(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def download(name, file, etag_timeout):
        if name == "a/b":
            raise OSError("404 is what\nthe server said")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert models.look_up("owner/name", "config.json") == "{}"
    with pytest.raises(UserError, match=r"^model a/b can't be fetched from \S+: 404 is what$"):
        models.look_up("a/b", "config.json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs the hub: pip install 'lora-advice\[hub\]'"):
        models.look_up("a/b", "config.json")
