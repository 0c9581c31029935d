"""Fixtures and functions that train a condition of the tiny base on a small dataset."""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, GemmaConfig, MistralConfig, Qwen2Config

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import ChatDataset, ModelSpec, TinyModel
from lorabench.data.sft import build_dataset
from lorabench.data.tokens import cache_key, read_tokens, write_tokens
from lorabench.models.attention import attend_in_blocks
from lorabench.models.base import load_model, load_tokenizer, skeleton
from lorabench.models.lora import add_lora, use_fast_products
from lorabench.models.passes import recompute_activations
from lorabench.planning.plan import make_plan
from lorabench.runs import Condition, Job, Run
from lorabench.store.layout import Layout
from lorabench.training.checkpoint import Checkpoint
from lorabench.training.distributed import SINGLE_PROCESS, Processes
from lorabench.training.job import run_job
from lorabench.training.loss import example_nlls
from lorabench.training.run import Machine
from lorabench.training.sft import ValidationCurve, train_sft

TINY, CPU = TinyModel(kind="tiny"), torch.device("cpu")
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
# Tests of a GPU have a small form on the CPU, which shows that they can pass and, with a fault, fail.
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
INSTRUCT = {"kind": "instruct", "train": 40, "validation": 8, "test": 8, "max_chars": 120}


def varlen_attn(query, key, value, starts, key_starts, longest, most_keys, *, scale, window_size, enable_gqa):
    """Compute torch's function of this name, which needs a GPU, sequence by sequence."""
    ends, key_ends = starts.tolist(), key_starts.tolist()
    assert (longest, most_keys, window_size) == (max(np.diff(ends)), max(np.diff(key_ends)), (-1, 0))
    parts = []
    for (start, end), (first, last) in zip(pairwise(ends), pairwise(key_ends), strict=True):
        heads = (tensor.transpose(0, 1) for tensor in (query[start:end], key[first:last], value[first:last]))
        # The last query sees the last key.
        seen = torch.ones(end - start, last - first, dtype=torch.bool).tril(last - first - end + start)
        attended = torch.nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """Let fused models compute attention in shared rows on a CPU too."""
    on_gpu = varlen.varlen_attn

    def chosen(query, *others, **options):
        return (on_gpu if query.is_cuda else varlen_attn)(query, *others, **options)

    monkeypatch.setattr(varlen, "varlen_attn", chosen)


# Families without a shipped base, with random weights: grouped heads, biases, tied and scaled embeddings.
FAMILIES: dict[str, Any] = {
    "mistral": partial(MistralConfig, sliding_window=24),
    "qwen2": Qwen2Config,
    "gemma": partial(GemmaConfig, tie_word_embeddings=True),
}


def base_of(name: str) -> Any:
    """Return a new tiny base: a shipped one, or one of a family in `FAMILIES` with random weights."""
    if name not in FAMILIES:
        return load_model(TinyModel(kind="tiny", name=name))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    # Without a padding token, since Gemma would keep its embedding at zero.
    tokens = {"vocab_size": 1024, "pad_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name](**sizes, **heads, **tokens))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
    attend_in_blocks(model)
    return model.train()


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A folder with a small instruction mixture and its tokens."""
    folder = tmp_path_factory.mktemp("data")
    build_dataset(ChatDataset(**INSTRUCT), folder / "data.parquet")
    write_tokens(folder / "data.parquet", load_tokenizer(TINY), folder / "tokens", 512)
    return folder


def splits_of(folder: Path):
    """Read the token splits of a folder."""
    return read_tokens(folder / "tokens", cache_key(load_tokenizer(TINY), folder / "data.parquet"))


@pytest.fixture(scope="session")
def data(data_folder):
    """Splits with examples of 30 to 70 tokens."""
    return splits_of(data_folder)


def condition_of(method: str, rank: int | None, steps: int, batch_size: int) -> Condition:
    placement, alpha = (None, None) if method == "fullft" else ("all", 32.0)
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
    keeping: int | None = None,
    model: Any = None,
    curve_examples: int | None = None,
    device: torch.device = CPU,
):
    """Train on a newly loaded model, or on another base; return the outcome and the trained model.

    Where `keeping` is a number, only so many layers, the last, keep their activations.
    """
    protocol = protocol or Protocol()
    autocast = torch.bfloat16 if protocol.precision == "bf16" else None
    machine = Machine(device, max_batch_tokens, processes=processes, autocast=autocast)
    # Sharding moves the weights from the first process's CPU.
    start = device if processes.count == 1 else CPU
    model = model or (load_model(spec).to(start) if processes.first else skeleton(spec))
    if keeping is not None:
        recompute_activations(model, keeping)
    if condition.method != "fullft":
        head, init_a = protocol.include_unembedding, condition.init_a or 1.0
        arm = condition.rank, condition.placement, condition.alpha
        model = add_lora(model, *arm, head, seed, init_a, condition.method)
        if processes.count == 1:
            use_fast_products(model)
    model = processes.shard(model)
    # B of a new adapter is zero.
    base = example_nlls(model, data["validation"], machine)
    validation = ValidationCurve(data["validation"], curve_examples, base)
    run = Run(condition, lr, seed)
    checkpoint = Checkpoint(folder / "checkpoint.safetensors", run.run_id, checkpoint_seconds, processes)
    return train_sft(run, model, data, protocol, machine, checkpoint, validation, tick), model


def series(outcome, metric: str, split: str = "train") -> list[float]:
    """Return the values of a metric in the order of steps."""
    return [point.value for point in outcome.curve if (point.split, point.metric) == (split, metric)]


@pytest.fixture
def built(data_folder):
    """Return a function that puts the dataset and its tokens where a layout expects them."""

    def put(layout: Layout) -> None:
        places = {"data.parquet": layout.dataset("instruct"), "tokens": layout.tokens("tiny", "instruct")}
        for name, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data_folder / name, place)

    return put


@pytest.fixture
def ready(tmp_path, raw_preset, monkeypatch, built):
    """Return a function that prepares a preset's data in a new working directory and returns its plan and layout."""

    def make(name, execution=None, ranks=(4,), **lrs):
        [[block]] = raw_preset["experiments"].values()
        block |= {"ranks": {"all": list(ranks)}, "lrs": {"fullft": [1e-3], "lora": [1e-3]} | lrs, "steps": 5}
        raw_preset["datasets"]["instruct"] = INSTRUCT
        raw_preset["execution"] |= execution or {}
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("mine.yaml").write_text(yaml.safe_dump(raw_preset))
        layout = Layout.of("mine.yaml")
        built(layout)
        return make_plan(layout.preset), layout

    return make


class BrokenError(Exception):
    """Interrupts a run."""


def breaking_at(last: int | None) -> Callable[[int], None]:
    """Return a `tick` that interrupts a run in a step, before its checkpoint is written."""

    def tick(step: int) -> None:
        if step == last:
            raise BrokenError

    return tick


def write_tied(folder: Path) -> None:
    """Write a base whose unembedding shares the embedding's weights."""
    model = load_model(TINY)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    model.save_pretrained(folder)


def sweep_of(plan, method: str):
    return next(sweep for sweep in plan.sweeps if sweep.condition.method == method)


def trained(plan, layout, *sweeps):
    """Train sweeps as one job and return its rows."""
    run_job(plan, Job(sweeps), layout, lambda line: None)
    return pq.read_table(layout.job(Job(sweeps))).to_pandas()


def command(job_id: str, *options: str) -> list[str]:
    """Return the command that trains a job, or a sweep by its id, of the preset `mine.yaml`."""
    return [sys.executable, "-m", "lorabench.cli", "step", "train", job_id, "--preset", "mine.yaml", *options]
