"""The shell commands of the pages run as they are written; those that train are run by Snakemake as a dry run.

Commands that a test here must not run are named below with the reason, so a new command is either run or named.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from lora_advice.cli import app as advice
from peft import LoraConfig, get_peft_model
from typer.main import get_command

from lorabench.claims.judge import judge_claims
from lorabench.cli.commands import app
from lorabench.custom.model import find_model
from lorabench.models.base import load_model
from lorabench.models.specs import shipped_folder
from lorabench.store.io import write_frame
from lorabench.store.tables import Tables

from ..conftest import MARGINS, REPOSITORY
from ..custom.conftest import write_rows
from ..forks import run_forked
from ..handmade import curves_of, make_sweep, runs_table
from ..workflow.checkout import fresh_clone, shell

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(REPOSITORY.glob("docs/**/*.md")),
    *REPOSITORY.glob("studies/*/README.md"),
    *sorted(REPOSITORY.glob("advice/**/*.md")),
]

ELSEWHERE = {
    "python3 -m venv .venv": "CI begins with it",
    "make setup": "its commands are those with which CI begins",
    ". .venv/bin/activate": "CI does it",
    "pre-commit install": "it changes the clone of the reader, who may leave it out",
    "pip install vllm": "CI does it, for a CPU",
    "pip install -c constraints-vllm.txt": "CI does it",
    "pip uninstall -y torchaudio torchcodec": "CI does it",
    "python -m benchmarks.speed": "it takes long; tests/benchmarks/test_speed.py runs its quick form",
    "lorabench doctor": "it takes minutes; tests/doctor/test_checks.py makes its checks",
    **dict.fromkeys(
        ("lorabench freeze", "git ", "lorabench run long_runs@100", "python workflow/scripts/"),
        "they need finished runs; tests/report/test_freeze.py and tests/scripts do what they do",
    ),
    **dict.fromkeys(
        ("lorabench decide", "lorabench run laptop --batches", "lorabench claims --preset laptop --tables"),
        "they need runs; tests/cli/test_batches.py does what they do",
    ),
    **dict.fromkeys(
        ("lorabench import --from", "lorabench claims --tables runs"),
        "they need runs of another trainer; tests/sources/test_logs.py does what they do",
    ),
    "lorabench evidence --out": "the next command of that name does the same with a table more",
    'pip install "lora-advice': "the suite's tests have it installed",
    "snakemake doctor": "it trains nothing; tests/workflow/test_slurm_profile.py plans it",
}
"""The beginnings of commands that are not run here, and why."""
PLANNED = "lorabench run smollm2"
"""It trains for hours on a GPU, and is planned as Snakemake's own commands are."""


def commands() -> list[str]:
    """Return the lines of all shell blocks without their comments, each once, in the order of the pages."""
    blocks = [block for page in PAGES for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)]
    lines = [line.partition("    #")[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A clone with the files that the examples name: tables, a model, data."""
    clone = fresh_clone(tmp_path_factory.mktemp("docs"))
    for place, dataset in (("results/laptop", "instruct"), ("from_the_cluster", "worked")):
        runs = runs_table([row for rank in (None, 1, 16) for row in make_sweep(rank, dataset=dataset)])
        write_frame(runs, "runs", clone / place / "tables")
        write_frame(curves_of(runs), "curves", clone / place / "tables")
    laptop = clone / "results/laptop/tables"
    write_frame(judge_claims(Tables.read(laptop)), "claims", laptop)
    (clone / "margins.yaml").write_text(yaml.safe_dump(MARGINS))
    shutil.copytree(shipped_folder("llama-128"), clone / "path/to/model")
    adapter = get_peft_model(load_model(find_model("llama-128").spec), LoraConfig(target_modules="all-linear"))
    adapter.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight.data.normal_(std=0.02)
    adapter.save_pretrained(clone / "path/to/adapter")
    write_rows(clone / "my.jsonl", 50)
    (clone / "path/to/config.yaml").write_text("base_model: my/model-1b\nlearning_rate: 2.0e-5\ndatasets: []\n")
    problems = (json.dumps({"question": f"What is {n} + 2?", "answer": n + 2}) for n in range(50))
    (clone / "problems.jsonl").write_text("\n".join(problems))
    return clone


def test_every_command_is_run_here_or_named():
    lines = commands()
    assert all(any(line.startswith(start) for line in lines) for start in ELSEWHERE)
    programs = {shlex.split(line)[0] for line in lines if not line.startswith(tuple(ELSEWHERE))}
    assert programs == {"lorabench", "lora-advice", "snakemake"}


def test_commands_in_the_text_exist_with_their_options():
    """`run`, `decide` and `step` pass options on."""
    commands = get_command(app).commands | get_command(advice).commands
    known = {name: {option for each in command.params for option in each.opts} for name, command in commands.items()}
    wrong = []
    for page in PAGES:
        fence, text = r"^```\w*\n(.*?)^```", page.read_text()
        lines = [line for block in re.findall(fence, text, re.M | re.S) for line in block.splitlines()]
        inline = re.findall(r"`([^`]+)`", re.sub(fence, "", text, flags=re.M | re.S))
        for line in [*lines, *(" ".join(code.split()) for code in inline)]:
            for name, rest in re.findall(r"^(?:lorabench|lora-advice) ([a-z-]+)([^#|]*)", line):
                options = set() if name in ("run", "decide", "step") else set(re.findall(r"--[a-z-]+", rest))
                if name not in known or options - known[name]:
                    wrong.append(f"{page.name}: {line}")
    assert wrong == []


def run(line: str, folder: Path) -> str:
    status, output = run_forked(shlex.split(line), folder)
    # This configuration has an error, for everybody to see one.
    assert status == line.endswith("audit examples/axolotl.yaml"), f"{line}\n{output}"
    return output


@pytest.mark.slow
def test_lorabench_commands_run_in_the_order_of_the_pages(folder):
    for line in commands():
        if line.startswith(("lorabench ", "lora-advice ")) and not line.startswith((*ELSEWHERE, PLANNED)):
            assert "Traceback" not in run(line, folder), line
    assert (folder / "my.yaml").is_file()
    assert {"fig1_envelopes", "fig2_lr_by_rank"} <= {figure.stem for figure in (folder / "figures").glob("*.svg")}
    assert "lora_alpha" in (folder / "finetune-trl/trl.yaml").read_text()
    merged = Tables.read(folder / "merged")
    assert set(merged.runs["dataset"]) == {"instruct", "worked"}
    verdicts = judge_claims(merged).set_index("claim_id")["verdict"]
    assert verdicts["A7"] != "not tested"


@pytest.mark.slow
def test_snakemake_commands_plan_what_the_pages_say(folder):
    run("lorabench init planned.yaml --model tiny --data my.jsonl", folder)
    for line in commands():
        if line.startswith(("snakemake ", PLANNED)) and not line.startswith(tuple(ELSEWHERE)):
            dry_run = line if "--dry-run" in line else f"{line} --dry-run --quiet rules"
            dry_run = dry_run.replace("my.yaml", "planned.yaml")
            output = shell(dry_run, folder) if "|" in dry_run else run(dry_run, folder)
            assert re.search(r"^(train|rule train)\b", output, re.M), f"{line}\n{output}"
