"""Tasks of lm-eval with examples, a sentence splitter or members, fetched from a hub here and evaluated offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pyarrow.parquet as pq
import pytest
import yaml

from lorabench.config.loading import load_preset
from lorabench.planning.plan import make_plan
from lorabench.runs import EvalJob
from lorabench.store.layout import Layout

from ..hub.repositories import write_configs, write_gsm8k, write_jsonl
from ..hub.server import Hub, serving
from .conftest import RAW

pytestmark = pytest.mark.slow

SUBJECTS = 57  # the members of MMLU


def write_repositories(root: Path) -> None:
    """Write what the tasks read: files, columns and types of the real ones, with few rows."""
    write_gsm8k(root, train=8, test=3)
    # The instructions need the sentence splitter, a language detector, and neither.
    instructions = {
        "punctuation:no_comma": {"relation": None, "num_sentences": None, "language": None},
        "length_constraints:number_sentences": {"relation": "less than", "num_sentences": 30, "language": None},
        "language:response_language": {"relation": None, "num_sentences": None, "language": "de"},
    }
    rows = [
        {"key": number, "prompt": "Write.", "instruction_id_list": [name], "kwargs": [arguments]}
        for number, (name, arguments) in enumerate(instructions.items())
    ]
    write_jsonl(root / "google/IFEval/ifeval_input_data.jsonl", rows)
    question = {"question": "2 + 2?", "subject": "x", "choices": ["1", "2", "4", "8"], "answer": 2}
    # The names of MMLU's members are those of lm-eval's own tasks.
    tasks = (Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml")
    members = {yaml.safe_load(path.read_text())["dataset_name"] for path in tasks}
    splits = {"test": [question] * 3, "validation": [question], "dev": [question] * 5}
    write_configs(root / "cais/mmlu", dict.fromkeys(sorted(members), splits))


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder with a preset `mine.yaml` and its own caches."""
    caches = {"HF_HOME": str(folder / "hf"), "NLTK_DATA": str(folder / "nltk"), "HOME": str(folder)}
    # HF_DATASETS_CACHE and similar variables would take precedence over HF_HOME.
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | caches | environment
    command = [sys.executable, "-m", "lorabench.cli", *arguments, "--preset", "mine.yaml"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def fetch(folder: Path) -> subprocess.CompletedProcess[str]:
    with serving(folder / "hub") as hub:
        return run(folder, "step", "fetch", HF_ENDPOINT=hub.endpoint)


def base_of(folder: Path) -> EvalJob:
    return make_plan(load_preset(str(folder / "mine.yaml"))).evaluations()[0]


def evaluate(folder: Path) -> subprocess.CompletedProcess[str]:
    """Evaluate the base without a hub."""
    job = base_of(folder)
    return run(folder, "step", "evaluate", job.eval_id, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")


def test_what_was_fetched_is_evaluated_offline_with_its_settings_and_commits(tmp_path):
    named = {task.name: task for name in ("core", "paper") for task in load_preset(name).evaluation.tasks}
    # Each member of MMLU takes as many.
    tasks = [
        named[name].model_dump(exclude_unset=True) | {"max_new_tokens": 6, "limit": limit}
        for name, limit in (("gsm8k", 2), ("ifeval", 2), ("mmlu", 1))
    ]
    raw = RAW | {"evaluation": RAW["evaluation"] | {"tasks": tasks}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
    write_repositories(tmp_path / "hub/datasets")
    missing = "can't be loaded; run `lorabench step fetch` online: "
    # What was not fetched is named: first the data, then the splitter.
    for result, said in (
        (evaluate(tmp_path), f"'gsm8k' {missing}"),
        (fetch(tmp_path), f"'ifeval' {missing}nltk has no "),
    ):
        assert result.returncode == 2
        assert said in result.stderr
    fetched = tmp_path / Layout.of(str(tmp_path / "mine.yaml")).eval_tasks
    assert not fetched.exists()
    # nltk's sentence splitter as a download would leave it, trained on almost nothing.
    english = tmp_path / "nltk/tokenizers/punkt_tab/english"
    english.mkdir(parents=True)
    learned = {"abbrev_types.txt": "mr", "collocations.tab": "mr\tsmith", "ortho_context.tab": "he\t6"}
    for name, text in (learned | {"sent_starters.txt": "he"}).items():
        (english / name).write_text(text)
    result = fetch(tmp_path)
    assert result.returncode == 0, result.stderr
    tasks = json.loads(fetched.read_text())["tasks"]
    assert (tasks["gsm8k"], len(tasks["mmlu"])) == (["gsm8k"], SUBJECTS)
    commit = Hub(tmp_path / "hub").commit("datasets", "openai/gsm8k")

    result = evaluate(tmp_path)
    assert result.returncode == 0, result.stderr
    scores = pq.read_table(tmp_path / Layout.of(str(tmp_path / "mine.yaml")).evals(base_of(tmp_path))).to_pandas()
    levels = [f"{level}_level_{kind}_acc" for level in ("inst", "prompt") for kind in ("loose", "strict")]
    metrics = scores.groupby("task")["metric"].agg(sorted).to_dict()
    assert metrics == {"gsm8k": ["exact_match"] * 2, "ifeval": levels, "mmlu": ["acc"]}
    assert set(scores["filter"]) == {"strict-match", "flexible-extract", "none"}
    assert scores["value"].between(0, 1).all()
    assert scores["higher_is_better"].all()
    by_task = scores.drop_duplicates("task").set_index("task")
    assert by_task["num_fewshot"].to_dict() == {"gsm8k": 5, "ifeval": 0, "mmlu": 0}
    assert by_task["n_samples"].to_dict() == {"gsm8k": 2, "ifeval": 2, "mmlu": SUBJECTS}
    assert by_task.index[by_task["template_sha256"].notna()].tolist() == ["ifeval"]
    config = json.loads(by_task.loc["gsm8k", "task_config"])
    assert config["generation_kwargs"]["max_gen_toks"] == 6
    assert config["data_revision"] == commit
    assert len(json.loads(by_task.loc["mmlu", "task_config"])) == SUBJECTS
