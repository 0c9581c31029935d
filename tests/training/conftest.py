"""Fixtures and functions that train a condition of the tiny base on a small dataset."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lorabench.config.datasets import ChatDataset
from lorabench.config.experiments import Protocol
from lorabench.config.models import ModelSpec, TinyModel
from lorabench.data.sft import build_dataset
from lorabench.data.tokens import Limits, cache_key, read_tokens, write_tokens
from lorabench.models.base import load_model, load_tokenizer, skeleton
from lorabench.models.lanes.lora import stack_lora
from lorabench.models.lanes.shelf import single_lane
from lorabench.models.lora import adapter_pairs, add_lora
from lorabench.models.passes import recompute_activations
from lorabench.planning.plan import make_plan
from lorabench.runs import Condition, Job, Run
from lorabench.store.layout import Layout
from lorabench.training.distributed import SINGLE_PROCESS, Processes
from lorabench.training.drive import train_alone
from lorabench.training.job import run_job
from lorabench.training.lane_checkpoints import LaneCheckpoints, groups_at_same_position
from lorabench.training.loss import mean_nll
from lorabench.training.run import Machine
from lorabench.training.sft import train_sft
from lorabench.training.sft.serve import SftServer

TINY = TinyModel(kind="tiny")


def make_data(folder: Path, max_chars: int) -> Path:
    """Write a small instruction mixture (80 train, 8 validation, 8 test examples) and its tokens."""
    spec = ChatDataset(kind="instruct", train=80, validation=8, test=8, max_chars=max_chars)
    build_dataset(spec, folder / "data.parquet")
    write_tokens(folder / "data.parquet", load_tokenizer(TINY), folder / "tokens", Limits(512))
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """The folder of the splits of `data`."""
    return make_data(tmp_path_factory.mktemp("data"), max_chars=240)


def splits_of(folder: Path):
    """Read the token splits of a folder."""
    return read_tokens(folder / "tokens", cache_key(load_tokenizer(TINY), folder / "data.parquet"))


@pytest.fixture(scope="session")
def data(data_folder):
    """Splits with examples of 35 to 149 tokens."""
    return splits_of(data_folder)


@pytest.fixture(scope="session")
def short_data(tmp_path_factory):
    """Splits with examples of 30 to 70 tokens, for many runs of many steps."""
    return splits_of(make_data(tmp_path_factory.mktemp("short"), max_chars=120))


def condition_of(method: str, rank: int | None, steps: int, batch_size: int) -> Condition:
    placement, alpha = ("all", 32.0) if method == "lora" else (None, None)
    return Condition("sft", "tiny", "data", method, rank, placement, alpha, batch_size, steps, identity="test")


def train(
    condition: Condition,
    data,
    folder: Path,
    lr: float,
    seed: int = 0,
    max_batch_tokens: int = 16_384,
    protocol: Protocol | None = None,
    checkpoint_seconds: float = 1e9,
    tick=lambda step: None,
    spec: ModelSpec = TINY,
    processes: Processes = SINGLE_PROCESS,
    recompute: bool = False,
):
    """Train on a newly loaded model; return the outcome and the trained model."""
    protocol = protocol or Protocol()
    machine = Machine(torch.device("cpu"), max_batch_tokens, checkpoint_seconds, processes=processes)
    model = load_model(spec) if processes.first or not processes.sharded else skeleton(spec)
    if recompute:
        recompute_activations(model)
    if condition.method == "lora":
        model = add_lora(model, condition.rank, "all", condition.alpha, protocol.include_unembedding, seed)
    model = processes.shard(model)
    base_nll = mean_nll(model, data["validation"], max_batch_tokens, machine.device, None, processes)
    run = Run(condition, lr, seed)
    if condition.method == "lora" and not processes.sharded:
        stack = stack_lora(model, ["default"])
    else:
        stack = single_lane(model, "default", "default", adapter_pairs(model))
    paths = {run.run_id: folder / "checkpoint.safetensors"}
    assert groups_at_same_position(paths, processes) == [[run.run_id]]
    checkpoints, vocabulary = LaneCheckpoints(paths, checkpoint_seconds, processes), model.config.vocab_size
    [lane] = stack.lanes.values()
    running = train_sft(run, lane, vocabulary, data, protocol, processes, checkpoints, base_nll, tick)
    served = SftServer(stack, data, machine, machine.autocast(protocol))
    return train_alone(running, served, "default"), model


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The dataset and the tokens of `raw_preset`, built once for all tests that use `ready`."""
    folder = tmp_path_factory.mktemp("built")

    def build(layout: Layout) -> None:
        dataset, tokens = layout.dataset("instruct"), layout.tokens("tiny", "instruct")
        if not (folder / "dataset").exists():
            build_dataset(layout.preset.datasets["instruct"], folder / "dataset")
            write_tokens(folder / "dataset", load_tokenizer(TINY), folder / "tokens", Limits(512))
        dataset.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "dataset", dataset)
        tokens.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "tokens", tokens)

    return build


@pytest.fixture
def ready(tmp_path, raw_preset, monkeypatch, built):
    """Return a function that prepares a preset's data in a new working directory and returns its plan and layout."""

    def make(name, execution=None, ranks=(4,), **lrs):
        raw_preset["experiments"]["rank"][0] |= {
            "ranks": {"all": list(ranks)},
            "lrs": {"fullft": [1e-3], "lora": [1e-3]} | lrs,
        }
        raw_preset["datasets"]["instruct"]["train"] = 32
        raw_preset["execution"] |= execution or {}
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("mine.yaml").write_text(yaml.safe_dump(raw_preset))
        layout = Layout.of("mine.yaml")
        built(layout)
        return make_plan(layout.preset), layout

    return make


def trained(plan, layout, method):
    """Train the sweep of one method; return its rows and the reported lines."""
    sweep = next(s for s in plan.sweeps if s.condition.method == method)
    lines: list[str] = []
    run_job(plan, Job((sweep,)), layout, lines.append)
    return pq.read_table(layout.job(Job((sweep,)))).to_pandas(), lines
