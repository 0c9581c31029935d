"""What `lora-advice audit` prints, its exit status, and the schemas of JSON and SARIF."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from lora_advice.audit.output import Report
from lora_advice.cli import app
from pydantic import TypeAdapter
from typer.testing import CliRunner

REPOSITORY = Path(__file__).parents[3]
SCHEMA = REPOSITORY / "advice/docs/audit.schema.json"
AXOLOTL = (
    "\nbase_model: org/model-8b\nload_in_4bit: true\ndatasets:\n  - path: org/data\nadapter: qlora\nlora_r: 32\n"
    "lora_alpha: 16\nlora_target_linear: true\npeft_use_rslora: true\nmicro_batch_size: 2\n"
    "gradient_accumulation_steps: 4\nnum_epochs: 3\nlr_scheduler: cosine\nlearning_rate: 2e-4\n"
)


def schema() -> str:
    """Return the schema of --json; `python advice/tests/audit/test_output.py` writes it."""
    return json.dumps(TypeAdapter(Report).json_schema(), indent=2) + "\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one right and one wrong configuration, and one that is not understood; only readers find things."""
    for name in ("lr_findings", "check_layers", "check_settings", "compare_runs"):
        monkeypatch.setattr(f"lora_advice.audit.{name}", lambda *arguments: [])
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
    assert note.startswith("  note lr-text: line 15:")
    assert bad.startswith("bad.yml: not read: it is not valid YAML")
    assert counts == "2 runs, 1 file not read: 1 error, 0 warnings, 1 note"
    assert audit("a b.yml") == (0, f"{right}\n1 run: 0 errors, 0 warnings, 0 notes\n")


def test_json_has_the_documented_schema(folder):
    status, printed = audit(".", "--json")
    report = json.loads(printed)
    assert status == 1
    assert SCHEMA.read_text() == schema(), "run: python advice/tests/audit/test_output.py"
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert report["counts"] == {"error": 1, "warning": 0, "note": 1}
    assert [config["lr"] for config in report["configs"]] == [2e-4, 2e-4]
    assert {(finding["code"], finding["path"], finding["line"]) for finding in report["findings"]} == {
        ("no-effect", "wrong.yml", 7),
        ("lr-text", "wrong.yml", 15),
    }
    assert [missing["path"] for missing in report["not_read"]] == ["bad.yml"]


def test_sarif(folder):
    (folder / "a b.yml").write_text(AXOLOTL)
    status, _ = audit(".", "--sarif", "out.sarif")
    report = json.loads((folder / "out.sarif").read_text())
    (run,) = report["runs"]
    assert (status, report["version"], set(run["tool"]["driver"])) == (1, "2.1.0", {"name", "version", "rules"})
    assert {(result["ruleId"], result["level"], "text" in result["message"]) for result in run["results"]} == {
        ("lr-text", "note", True),
        ("no-effect", "error", True),
    }
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["lr-text", "no-effect"]
    places = [result["locations"][0]["physicalLocation"] for result in run["results"]]
    assert (places[0]["artifactLocation"]["uri"], places[0]["region"]["startLine"]) == ("a%20b.yml", 15)


def test_a_named_file_that_is_not_read_ends_with_2_after_the_findings_of_the_others(folder):
    assert audit("bad.yml")[0] == 2
    status, printed = audit("wrong.yml", "bad.yml", "--sarif", "out.sarif")
    assert status == 2
    assert "error no-effect" in printed
    assert "bad.yml: not read: it is not valid YAML" in printed
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
    assert all(name in printed for name in ("a\\n::error::b.yml", "\\x3a:warning::c.yml", "f\\udcff.yml"))
    assert "##[" not in printed
    assert "f%FF.yml" in (folder / "out.sarif").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["."], ". can't be written: it exists and is no regular file"),
        (["/dev/null"], "/dev/null can't be written: it exists and is no regular file"),
        (["out.sarif", ""], "audit: no path is given; a file or a folder is needed, and an empty path is neither"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(folder, arguments, message):
    result = CliRunner().invoke(app, ["audit", "a b.yml", "--sarif", *arguments], prog_name="lora-advice")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"lora-advice: {message}")
    assert sorted(path.name for path in folder.iterdir()) == ["a b.yml", "bad.yml", "wrong.yml"]


def test_the_task_of_a_file_that_does_not_say_it_is_the_users(folder):
    (folder / "trl.yaml").write_text("model_name_or_path: org/model-8b\nuse_peft: true\nlearning_rate: 1.0e-5\n")
    assert "trl: training of org/model-8b" in audit("trl.yaml")[1]
    assert "trl: RL of org/model-8b" in audit("trl.yaml", "--task", "rl")[1]
    assert "axolotl: SFT of" in audit("a b.yml", "--task", "rl")[1]
    result = CliRunner().invoke(app, ["audit", "trl.yaml", "--task", "dpo"], prog_name="lora-advice")
    assert (result.exit_code, result.stderr) == (2, "lora-advice: --task dpo: allowed: sft, rl\n")


def test_every_code_has_a_heading_in_the_docs():
    package = REPOSITORY / "advice/lora_advice/audit"
    codes = {text["code"] for text in yaml.safe_load((package / "texts.yaml").read_text()).values()}
    sources = "".join(path.read_text() for path in package.rglob("*.py"))
    codes |= set(re.findall(r'(?:Finding\(\s*|\bcode[ ,\w]*=\s*)"([a-z-]+)"', sources))
    headings = set(re.findall(r"^### ([a-z-]+)$", (REPOSITORY / "advice/docs/audit-codes.md").read_text(), re.M))
    assert codes >= {"lr-text", "no-effect"}
    assert sorted(codes - headings) == []


def test_the_command_imports_nothing_heavy(folder):
    """A configuration is answered at once: what takes long to import is counted, since times vary."""
    call = (
        "import sys; from lora_advice.cli import app; app(['audit', 'a b.yml'], standalone_mode=False);"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", call]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pandas", "scipy", "huggingface_hub", "lorabench"} & set(done.stdout.split())


def test_the_action_audits_the_paths(folder):
    steps = yaml.safe_load((REPOSITORY / "action.yml").read_text())["runs"]["steps"]
    # Actions of others would have to be pinned by their hash.
    assert [step["name"] for step in steps if "uses" in step] == []
    (script,) = [step["run"] for step in steps if step["name"] == "Audit"]
    script = script.replace("lora-advice audit", f"{sys.executable} -m lora_advice.cli audit")
    environment = os.environ | {"PATHS": "a b.yml\nwrong.yml", "SARIF": "out.sarif"}
    done = subprocess.run(["bash", "-e", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("2 runs: ")
    assert (folder / "out.sarif").is_file()


if __name__ == "__main__":
    SCHEMA.write_text(schema())
