"""The commands of lora-advice, which `lorabench` finds by entry points and does not import."""

from types import SimpleNamespace

from typer.testing import CliRunner

from lorabench.cli import commands
from lorabench.cli.commands import app


def test_all_words_go_to_the_command_of_the_other_package(monkeypatch):
    calls = []

    def entry_points(**asked):
        assert asked == {"group": "lorabench.commands", "name": "audit"}
        return [SimpleNamespace(load=lambda: lambda words, program: calls.append((words, program)))]

    monkeypatch.setattr(commands, "entry_points", entry_points)
    words = ["a.yaml", "--json", "--help", "-b"]
    assert CliRunner().invoke(app, ["audit", *words]).exit_code == 0
    assert calls == [(["audit", *words], "lorabench")]
