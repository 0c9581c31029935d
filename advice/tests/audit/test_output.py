"""What `lorabench audit` prints, its exit status, and the schemas of JSON and SARIF."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import jsonschema
import pytest
import yaml
from lora_advice.audit.output import Report
from pydantic import TypeAdapter
from typer.testing import CliRunner

from lorabench.cli.commands import app

from ..conftest import REPOSITORY
from .test_sft_readers import AXOLOTL

SCHEMA = REPOSITORY / "docs/audit.schema.json"


def schema() -> str:
    """Return the schema of --json; `python -m tests.audit.test_output` writes it."""
    return json.dumps(TypeAdapter(Report).json_schema(), indent=2) + "\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one right and one wrong configuration, and one that is not understood; only readers find things."""
    monkeypatch.setattr("lora_advice.audit.checks.RUN_CHECKS", ())
    monkeypatch.setattr("lora_advice.audit.checks.FOLDER_CHECKS", ())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.yml").write_text(AXOLOTL.replace("2e-4", "0.0002"))
    (tmp_path / "wrong.yml").write_text(AXOLOTL.replace("adapter: qlora", "adapter:"))
    (tmp_path / "bad.yml").write_text(f"{AXOLOTL}a: [")
    return tmp_path


def audit(*arguments):
    """Return the exit status and the lines of the command."""
    result = CliRunner().invoke(app, ["audit", *arguments])
    return result.exit_code, result.stdout


def test_text_says_what_was_understood_and_found(folder):
    status, printed = audit(".")
    right, wrong, error, note, bad, counts = printed.splitlines()
    assert status == 1
    assert right == (
        "a b.yml: axolotl: SFT of org/model-8b by LoRA, LR 2e-4 (cosine), batch 8 per device, 3 epochs, rank 32, "
        "alpha 16, on all linear layers, rsLoRA, 4-bit base"
    )
    assert wrong.startswith("wrong.yml: axolotl: SFT of org/model-8b by full fine-tuning, LR 2e-4")
    assert error.startswith("  error no-effect: line 7: lora_r: 32 has no effect")
    assert error.endswith("[the file alone; certain]")
    assert note.startswith("  note lr-text: line 17:")
    assert bad.startswith("bad.yml: not read: it is not valid YAML")
    assert counts == "2 runs, 1 file not read: 1 error, 0 warnings, 1 note"
    assert audit("a b.yml") == (0, f"{right}\n1 run: 0 errors, 0 warnings, 0 notes\n")


def test_of_many_runs_those_with_a_finding_are_shown(folder):
    for number in range(20):
        (folder / f"n{number}.yml").write_text(AXOLOTL)
    lines = audit(".")[1].splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["wrong.yml", "  error no-effect"]
    assert lines[2] == "21 more runs without an error or a warning (--all shows them)"
    assert len(lines) == 5
    assert len(audit(".", "--all")[1].splitlines()) > 40


def test_json_has_the_documented_schema(folder):
    status, printed = audit(".", "--json")
    report = json.loads(printed)
    assert status == 1
    assert SCHEMA.read_text() == schema(), "run: python -m tests.audit.test_output"
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert report["counts"] == {"error": 1, "warning": 0, "note": 1}
    assert [config["lr"] for config in report["configs"]] == [2e-4, 2e-4]
    assert {(finding["code"], finding["path"], finding["line"]) for finding in report["findings"]} == {
        ("no-effect", "wrong.yml", 7),
        ("lr-text", "wrong.yml", 17),
    }
    assert [missing["path"] for missing in report["not_read"]] == ["bad.yml"]


# What code hosts ask of SARIF 2.1.0, of the fields that are written.
SARIF = {
    "type": "object",
    "required": ["version", "$schema", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "required": ["tool", "results"],
                "properties": {
                    "tool": {
                        "required": ["driver"],
                        "properties": {"driver": {"required": ["name", "rules"], "properties": {}}},
                    },
                    "results": {
                        "type": "array",
                        "items": {
                            "required": ["ruleId", "level", "message", "locations"],
                            "properties": {
                                "level": {"enum": ["none", "note", "warning", "error"]},
                                "message": {"required": ["text"]},
                                "locations": {
                                    "items": {
                                        "required": ["physicalLocation"],
                                        "properties": {
                                            "physicalLocation": {
                                                "required": ["artifactLocation"],
                                                "properties": {
                                                    "artifactLocation": {
                                                        "properties": {"uri": {"pattern": "^[^ \\\\]+$"}}
                                                    },
                                                    "region": {"properties": {"startLine": {"minimum": 1}}},
                                                },
                                            }
                                        },
                                    }
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


def test_sarif(folder):
    (folder / "a b.yml").write_text(AXOLOTL)
    status, _ = audit(".", "--sarif", "out.sarif")
    report = json.loads((folder / "out.sarif").read_text())
    jsonschema.validate(report, SARIF)
    (run,) = report["runs"]
    assert status == 1
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["lr-text", "no-effect"]
    places = [result["locations"][0]["physicalLocation"] for result in run["results"]]
    assert (places[0]["artifactLocation"]["uri"], places[0]["region"]["startLine"]) == ("a%20b.yml", 17)


def test_a_named_file_that_is_not_read_ends_with_2_after_the_findings_of_the_others(folder):
    assert audit("bad.yml")[0] == 2
    status, printed = audit("wrong.yml", "bad.yml", "--sarif", "out.sarif")
    assert (status, "error no-effect" in printed, "bad.yml: not read: it is not valid YAML" in printed) == (
        2,
        True,
        True,
    )
    assert "no-effect" in (folder / "out.sarif").read_text()
    # A hook names all files.
    (folder / "other.yml").write_text("a: 1")
    assert [audit("other.yml", *more)[0] for more in ((), ("--skip-unknown",))] == [2, 0]
    assert audit("bad.yml", "--skip-unknown")[0] == 2
    os.mkfifo(folder / "pipe")
    assert audit("pipe")[1].startswith("pipe: not read: it is neither a file nor a folder")


def test_names_and_texts_of_files_steer_neither_a_terminal_nor_a_log(folder):
    for number, name in enumerate(("a\n::error::b.yml", "::warning::c.yml", "d\x1b[2J##[group]e.yml", "f\udcff.yml")):
        (folder / name).write_text(AXOLOTL if number % 2 else f"{AXOLOTL}x: !\x1b[31mred\n")
    status, printed = audit(".", "--all", "--sarif", "out.sarif")
    assert status == 1
    assert all(line.isprintable() and not line.lstrip().startswith("::") for line in printed.splitlines())
    assert [name in printed for name in ("a\\n::error::b.yml", "\\x3a:warning::c.yml", "f\\udcff.yml", "##[")] == [
        *(True, True, True, False)
    ]
    assert "f%FF.yml" in (folder / "out.sarif").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["."], "--sarif .: it is not a file; allowed: a file, or a name that is not there yet"),
        (["/dev/null"], "--sarif /dev/null: it is not a file"),
        (["out.sarif", ""], "audit: no path is given; a file or a folder is needed, and an empty path is neither"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(folder, arguments, message):
    result = CliRunner().invoke(app, ["audit", "a b.yml", "--sarif", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"lorabench: {message}")
    assert sorted(path.name for path in folder.iterdir()) == ["a b.yml", "bad.yml", "wrong.yml"]


def test_every_code_has_a_heading_in_the_docs():
    sources = "".join(path.read_text() for path in (REPOSITORY / "lorabench/audit").rglob("*.py"))
    codes = set(re.findall(r'(?:Finding\(\s*|\bcode[ ,\w]*=\s*)"([a-z-]+)"', sources))
    headings = set(re.findall(r"^### ([a-z-]+)$", (REPOSITORY / "docs/audit-codes.md").read_text(), re.M))
    assert codes >= {"lr-text", "no-effect"}
    assert sorted(codes - headings) == []


def test_the_command_imports_nothing_heavy(folder):
    """A configuration is answered at once: what takes long to import is counted, since times vary."""
    call = (
        "import sys; from lorabench.cli.commands import app; app(['audit', 'a b.yml'], standalone_mode=False);"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", call]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "datasets", "matplotlib"} & set(done.stdout.split())


def test_the_hook_calls_the_command():
    (hook,) = yaml.safe_load((REPOSITORY / ".pre-commit-hooks.yaml").read_text())
    assert (hook["id"], hook["entry"]) == ("lorabench-audit", "lorabench audit --skip-unknown")


def test_the_action_audits_the_paths(folder):
    steps = yaml.safe_load((REPOSITORY / "action.yml").read_text())["runs"]["steps"]
    # Actions of others would have to be pinned by their hash.
    assert [step["name"] for step in steps if "uses" in step] == []
    (script,) = [step["run"] for step in steps if step["name"] == "Audit"]
    script = script.replace("lorabench", f"{sys.executable} -m lorabench.cli")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PATHS": "a b.yml\nwrong.yml", "SARIF": "out.sarif"}
    done = subprocess.run(["bash", "-e", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("2 runs: 2 errors")
    assert (folder / "out.sarif").is_file()


def test_files_with_the_same_reason_are_counted(folder):
    for number in range(9):
        (folder / f"n{number}.txt").write_text("a: 1")
    lines = audit(*sorted(str(path) for path in folder.glob("*.txt")))[1].splitlines()
    assert len(lines) == 2
    assert "n0.txt and 8 other files: not read: it is of no format that is known" in lines[0]


if __name__ == "__main__":
    SCHEMA.write_text(schema())
