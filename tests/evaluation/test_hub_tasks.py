"""The lm-eval tasks of `core` and `paper`, fetched from a hub on this machine and then evaluated without a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from lorabench.config.loading import load_preset
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout

from ..hub.evaluation import SUBJECTS, write_repositories
from ..hub.server import Hub, serving
from .conftest import RAW

pytestmark = pytest.mark.slow

NOWHERE = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Place:
    """A working directory with a preset `mine.yaml` and its own caches."""

    folder: Path

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this project with only the caches of this directory."""
        caches = {"HF_HOME": str(self.folder / "hf"), "NLTK_DATA": str(self.folder / "nltk"), "HOME": str(self.folder)}
        # HF_DATASETS_CACHE and similar variables would take precedence over HF_HOME.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        command = [sys.executable, "-m", "lorabench.cli", *arguments, "--preset", "mine.yaml"]
        return subprocess.run(
            command, cwd=self.folder, env=inherited | caches | environment, capture_output=True, text=True, check=False
        )

    def evaluate(self) -> subprocess.CompletedProcess[str]:
        """Evaluate the base without a hub."""
        return self.run("step", "evaluate", self.job.eval_id, HF_HUB_OFFLINE="1", HF_ENDPOINT=NOWHERE)

    @property
    def job(self):
        return make_plan(load_preset(str(self.folder / "mine.yaml"))).evaluations()[0]


def place(folder: Path, tasks: list[dict]) -> Place:
    folder.mkdir(exist_ok=True)
    raw = RAW | {"evaluation": RAW["evaluation"] | {"tasks": tasks}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(raw))
    return Place(folder)


def write_splitter(folder: Path) -> None:
    """Write nltk's sentence splitter as a download would leave it, trained on almost nothing."""
    english = folder / "nltk/tokenizers/punkt_tab/english"
    english.mkdir(parents=True)
    learned = {"abbrev_types.txt": "mr", "collocations.tab": "mr\tsmith", "ortho_context.tab": "he\t6"}
    for name, text in (learned | {"sent_starters.txt": "he"}).items():
        (english / name).write_text(text)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Place:
    named = {task.name: task for name in ("core", "paper") for task in load_preset(name).evaluation.tasks}
    # MMLU has 57 members, of which each takes as many.
    limits = {name: 1 if name == "mmlu" else 2 for name in named}
    given = {"max_new_tokens": 6}
    tasks = [task.model_dump(exclude_unset=True) | given | {"limit": limits[name]} for name, task in named.items()]
    here = place(tmp_path_factory.mktemp("hub") / "work", tasks)
    write_splitter(here.folder)
    write_repositories(here.folder / "hub/datasets")
    with serving(here.folder / "hub") as hub:
        fetched = here.run("step", "fetch", "--out", "tasks.json", HF_ENDPOINT=hub.endpoint)
    assert fetched.returncode == 0, fetched.stderr
    result = here.evaluate()
    assert result.returncode == 0, result.stderr
    return here


@pytest.fixture(scope="module")
def scores(evaluated: Place) -> pd.DataFrame:
    layout = Layout.of(str(evaluated.folder / "mine.yaml"))
    return pq.read_table(evaluated.folder / layout.evals(evaluated.job)).to_pandas()


def commits(evaluated: Place) -> dict[str, str]:
    """Return the commit of each dataset on the hub."""
    hub = Hub(evaluated.folder / "hub")
    names = ["/".join(folder.parts[-2:]) for folder in (hub.root / "datasets").glob("*/*")]
    return {name: hub.commit("datasets", name) for name in names}


def test_versions_and_commits_of_what_was_fetched_are_kept(evaluated):
    expected = commits(evaluated)
    fetched = json.loads((evaluated.folder / "tasks.json").read_text())["tasks"]
    assert fetched["gsm8k"] == {"gsm8k": {"version": "3.0", "data": expected["openai/gsm8k"]}}
    assert len(fetched["mmlu"]) == SUBJECTS
    assert {leaf["data"] for leaves in fetched.values() for leaf in leaves.values()} == set(expected.values())


def test_every_task_has_its_scores_and_settings(scores, evaluated):
    levels = [f"{level}_level_{kind}_acc" for level in ("prompt", "inst") for kind in ("strict", "loose")]
    plain = {
        "hendrycks_math500": ["exact_match"],
        "aime24": ["exact_match"],
        "aime25": ["exact_match"],
        "ifeval": levels,
        "hellaswag": ["acc", "acc_norm"],
        "arc_challenge": ["acc", "acc_norm"],
        "mmlu": ["acc"],
    }
    expected = {(task, metric, "none") for task, metrics in plain.items() for metric in metrics}
    expected |= {("gsm8k", "exact_match", name) for name in ("strict-match", "flexible-extract")}
    assert set(scores[["task", "metric", "filter"]].itertuples(index=False, name=None)) == expected
    assert scores["value"].between(0, 1).all()
    assert scores["higher_is_better"].all()
    by_task = scores.drop_duplicates("task").set_index("task")
    assert by_task["num_fewshot"].to_dict() == dict.fromkeys(by_task.index, 0) | {"gsm8k": 5}
    assert by_task["n_samples"].to_dict() == dict.fromkeys(by_task.index, 2) | {"mmlu": SUBJECTS}
    assert by_task.index[by_task["template_sha256"].notna()].tolist() == ["ifeval"]
    config = json.loads(by_task.loc["gsm8k", "task_config"])
    assert config["generation_kwargs"]["max_gen_toks"] == 6
    assert config["data_revision"] == commits(evaluated)["openai/gsm8k"]
    assert len(json.loads(by_task.loc["mmlu", "task_config"])) == SUBJECTS


def test_data_or_a_splitter_that_were_not_fetched_are_named(tmp_path):
    missing = "can't be loaded; run `lorabench step fetch` with a connection: "
    result = place(tmp_path, [{"name": "arc_challenge", "about": "forgotten"}]).evaluate()
    assert result.returncode == 2
    assert f"'arc_challenge' {missing}" in result.stderr
    here = place(tmp_path, [{"name": "ifeval", "about": "learned"}])
    write_repositories(tmp_path / "hub/datasets")
    with serving(tmp_path / "hub") as hub:
        result = here.run("step", "fetch", "--out", "tasks.json", HF_ENDPOINT=hub.endpoint)
    assert result.returncode == 2
    assert f"'ifeval' {missing}nltk has no tokenizers/punkt_tab in" in result.stderr
    assert not (tmp_path / "tasks.json").exists()
