"""Looking a model's small file up on the hub, whose client is replaced."""

import sys
import threading
from types import SimpleNamespace

import pytest
from lora_advice import hub
from lora_advice.errors import UserError


def answering(monkeypatch, get):
    """Let the hub's client answer by a function of the address."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(get=lambda url, **options: get(url)))
    monkeypatch.setattr("huggingface_hub.hf_raise_for_status", lambda response: None)


def test_a_file_is_fetched_by_one_request(monkeypatch):
    asked = []
    answering(monkeypatch, lambda url: asked.append(url) or SimpleNamespace(text="{}"))
    assert hub.look_up("owner/name", "config.json") == "{}"
    assert [url.partition("/owner/")[2] for url in asked] == ["name/resolve/main/config.json"]


def test_what_goes_wrong_is_one_sentence(monkeypatch):
    def fails(url):
        raise OSError("404 is what\nthe server said")

    answering(monkeypatch, fails)
    with pytest.raises(UserError, match=r"^model a/b can't be fetched from \S+: 404 is what$"):
        hub.look_up("a/b", "config.json")
    monkeypatch.setattr(hub, "SECONDS", 0.05)
    answering(monkeypatch, lambda url: threading.Event().wait(5))
    with pytest.raises(UserError, match="no answer from"):
        hub.look_up("a/b", "config.json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs the hub: pip install 'lora-advice\[hub\]'"):
        hub.look_up("a/b", "config.json")
