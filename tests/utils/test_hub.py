"""Repositories are fetched once and then read offline: a server on this machine answers the hub's own client."""

import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.data.sft import about
from lorabench.errors import UserError
from lorabench.models.specs import shipped_folder
from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.store.layout import Layout
from lorabench.training.job import run_job
from lorabench.utils.hub import WantedRepository, fetch_repositories, read_fetched

from ..conftest import MARGINS, REPOSITORY
from ..hub import repositories as hub_repositories
from ..hub.server import serving
from ..workflow.checkout import snakemake

TULU3 = "allenai/tulu-3-sft-mixture"


def at(monkeypatch, endpoint, home):
    """Point the client at an endpoint, as HF_ENDPOINT and HF_HOME do when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", endpoint)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(home / "modules"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)


def unused_endpoint():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without repositories, and a client that knows no other; read_fetched forgets what it read."""
    for kind in ("models", "datasets", "work"):
        (tmp_path / kind).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    read_fetched.cache_clear()
    with serving(tmp_path) as server:
        at(monkeypatch, server.endpoint, tmp_path / "home")
        yield server


def fetched(*wanted):
    fetch_repositories(list(wanted), Path("pins"), Path("fetched.json"))
    return read_fetched(Path("fetched.json"))


def refused(*wanted):
    with pytest.raises(UserError) as caught:
        fetched(*wanted)
    assert "\n" not in str(caught.value)
    assert not Path("fetched.json").exists()
    return str(caught.value)


def add_model(hub, name="owner/tiny"):
    folder = hub.folder("models", name)
    shutil.copytree(shipped_folder("llama-64"), folder)
    # Other formats of the same weights, in folders and at the top level, must not be fetched.
    (folder / "original").mkdir()
    (folder / "original/params.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("# A model\n")
    (folder / "code.py").write_text("raise SystemExit")
    return folder


MODEL = WantedRepository("model", "owner/tiny", "main")
DATA = WantedRepository("dataset", TULU3, "main", ((None, "train"),))


def test_of_a_model_only_what_is_read_comes_and_a_moving_revision_stays_what_it_was(hub, tmp_path):
    folder = add_model(hub)

    def files():
        return {path.name for path in tmp_path.glob("home/hub/models--*/snapshots/*/*")}

    before = fetched(MODEL)
    commit = before["owner/tiny"].commit
    assert commit == hub.commit("models", "owner/tiny")
    names = {path.name for path in shipped_folder("llama-64").iterdir()} - {"README.md"}
    assert files() == names
    fetched(replace(MODEL, revision=commit, code=True))
    assert files() == names | {"code.py"}
    (folder / "README.md").write_text("# Another\n")
    Path("fetched.json").unlink()
    assert fetched(MODEL) == before
    pin = Path("pins/models--owner--tiny--main.txt")
    assert pin.read_text() == commit + "\n"
    pin.unlink()
    assert fetched(MODEL)["owner/tiny"].commit == hub.commit("models", "owner/tiny") != commit


def preset(hub):
    block = {"models": ["tiny"], "seeds": 1, "ranks": {"all": [2]}, "lrs": {"fullft": [], "lora": [1e-3]}}
    rollouts = {"problems_per_step": 2, "group_size": 2, "steps": 1, "max_new_tokens": 4, "mean_response_tokens": 4}
    raw = {
        "description": "a preset of the hub",
        "models": {"tiny": {"kind": "hub", "id": "owner/tiny", "parameters": 300_000, "hidden_size": 64}},
        "datasets": {
            "tulu3": {"kind": "hub", "id": TULU3, "train": 24, "validation": 4, "test": 4, "max_chars": 200}
            | {"max_tokens": 300, "mean_tokens": 20},
        },
        "problems": {"gsm8k": {"kind": "gsm8k", "train": 8, "validation": 4, "test": 4}},
        "experiments": {
            "rank": [block | {"datasets": ["tulu3"], "batch_sizes": [8]}],
            "rl_gsm8k": [block | {"problems": ["gsm8k"], "evaluations": 1, **rollouts}],
        },
        "margins": MARGINS,
        "execution": {"gflops": 1.0},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(raw))
    add_model(hub)
    hub_repositories.write_tulu3(hub.root / "datasets", map(hub_repositories.tulu3_row, range(60)))
    hub_repositories.write_gsm8k(hub.root / "datasets")
    return Layout.of("mine.yaml")


def lorabench(*arguments):
    """Run a command in this process; return its error message, empty on success."""
    result = CliRunner().invoke(app, ["step", *arguments, "--preset", "mine.yaml"])
    if result.exit_code == 0:
        return ""
    assert result.exit_code == 2, result.exception
    return result.stderr


@pytest.mark.slow
def test_fetched_once_the_rest_needs_no_connection(hub, monkeypatch, tmp_path):
    # The command that makes a dataset would else replace this process by one with fixed hashes.
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    layout = preset(hub)
    plan = make_plan(layout.preset)
    assert not hub.requests
    assert "not fetched from the hub yet" in lorabench("tokens", "tiny", "tulu3")
    assert "not fetched from the hub yet" in lorabench("dataset", "tulu3")
    assert not lorabench("fetch-model", "tiny")
    assert not lorabench("fetch-data", "tulu3")
    assert not lorabench("fetch-data", "gsm8k")
    commits = {name: hub.commit("datasets", name) for name in (TULU3, "openai/gsm8k")}
    commits["owner/tiny"] = hub.commit("models", "owner/tiny")
    # No server answers any more, and the client is in offline mode.
    at(monkeypatch, unused_endpoint(), tmp_path / "home")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert not lorabench("dataset", "tulu3")
    assert not lorabench("dataset", "gsm8k")
    assert not lorabench("tokens", "tiny", "tulu3")
    assert about(layout.dataset("tulu3"))["commit"] == commits[TULU3]
    for sweep in plan.sweeps:
        run_job(plan, Job((sweep,)), layout, lambda line: None)
        (row,) = pq.read_table(layout.job(Job((sweep,)))).to_pylist()
        environment = json.loads((layout.runs / row["run_id"] / "record.json").read_text())["environment"]
        data = TULU3 if sweep.condition.task == "sft" else "openai/gsm8k"
        assert environment["hub_commits"] == {name: commits[name] for name in ("owner/tiny", data)}
        assert environment["model_sha256"] == {"owner/tiny": commits["owner/tiny"]}
    assert not hub.requests
    # Runs on data of another commit are not mixed with the finished ones.
    changed = layout.fetched_data("tulu3")
    content = changed.read_text()
    changed.write_text(content.replace(commits[TULU3], "f" * 40))
    read_fetched.cache_clear()
    (sft,) = (sweep for sweep in plan.sweeps if sweep.condition.task == "sft")
    message = f"was made with {TULU3} at commit {commits[TULU3]}, but {'f' * 40} is fetched now"
    with pytest.raises(UserError, match=message):
        run_job(plan, Job((sft,)), layout, lambda line: None)
    # Files that were cleared away are named.
    changed.write_text(content)
    read_fetched.cache_clear()
    shutil.rmtree(tmp_path / "home")
    said = lorabench("dataset", "tulu3")
    assert re.search(f"data/train-0.* of dataset {TULU3} is not in the hub's cache .*; fetch it again", said)


def test_what_is_not_there_or_gated_is_one_sentence(hub):
    assert refused(MODEL).startswith("model owner/tiny is not on the hub, or is private and needs a token")
    folder = add_model(hub)
    assert refused(replace(MODEL, revision="v2")) == "model owner/tiny has no revision 'v2'"
    (folder / "model.safetensors").unlink()
    expected = "model owner/tiny has no .safetensors file at [0-9a-f]{40}; pickled weights are not loaded"
    assert re.fullmatch(expected, refused(MODEL))
    hub_repositories.write_gsm8k(hub.root / "datasets")
    split, config = (replace(DATA, id="openai/gsm8k", parts=((name, "validation"),)) for name in ("main", "algebra"))
    assert refused(split) == "dataset openai/gsm8k has no split 'validation'; allowed: train, test"
    assert "dataset openai/gsm8k has no configuration 'algebra'" in refused(config)
    llama = WantedRepository("model", "meta-llama/Llama-3.2-1B", "main")
    add_model(hub, llama.id)
    hub_repositories.write_tulu3(hub.root / "datasets", map(hub_repositories.tulu3_row, range(5)))
    hub.gated |= {llama.id, TULU3}
    assert refused(llama) == (
        f"model meta-llama/Llama-3.2-1B is gated: ask for access on {hub.endpoint}/meta-llama/Llama-3.2-1B, then log "
        "in with `hf auth login` or set HF_TOKEN"
    )
    assert f"dataset {TULU3} is gated: ask for access on {hub.endpoint}/datasets/{TULU3}" in refused(DATA)


def test_a_hub_that_does_not_answer(hub, monkeypatch, tmp_path):
    # The client waits longer after each attempt.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    add_model(hub)
    hub.broken = True
    said = refused(MODEL)
    assert f"model owner/tiny can't be fetched at main from {hub.endpoint}: " in said
    assert "503" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(MODEL)
    at(monkeypatch, unused_endpoint(), tmp_path / "home")
    pinned = WantedRepository("model", "owner/tiny", "f" * 40), WantedRepository("dataset", TULU3, "f" * 40, DATA.parts)
    for wanted in (MODEL, DATA, *pinned):
        assert f"can't be fetched at {wanted.revision} from http://127.0.0.1:" in refused(wanted)


@pytest.mark.slow
def test_snakemake_fetches_by_local_jobs_and_trains_without_a_connection(hub, tmp_path, monkeypatch):
    preset(hub)
    for name in ("workflow", "lorabench", "pyproject.toml"):
        (Path.cwd() / name).symlink_to(REPOSITORY / name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    config = ("--config", "preset=mine.yaml")
    assert "rule dataset" not in snakemake(Path.cwd(), *config, "--until", "fetch_model", "fetch_data")
    monkeypatch.setenv("HF_ENDPOINT", unused_endpoint())
    snakemake(Path.cwd(), *config)
    runs = pq.read_table("results/mine/tables/runs.parquet").to_pandas()
    assert set(runs.status) <= {"done", "unrewarded"}
    assert set(runs.task) == {"sft", "rl"}


def test_what_the_hub_does_not_have_is_one_sentence_of_init_at_once(hub):
    def refused_by(model, data, error):
        done = CliRunner().invoke(app, ["init", "mine.yaml", "--model", model, "--data", data])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"lorabench: {error}"), done.stderr

    Path("own.jsonl").write_text('{"prompt": "1", "completion": "1"}\n' * 60)
    refused_by("nosuch/model", "own.jsonl", "model nosuch/model is not on the hub, or is private and needs a token")
    hub.broken = True
    failed = f"dataset nosuch/data can't be fetched at main from {hub.endpoint}: Server error '503 Service"
    refused_by("tiny", "nosuch/data", failed)
    assert sum(hub.requests.values()) <= 2
