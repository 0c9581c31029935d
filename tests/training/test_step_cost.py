"""The cost of a training step: counted FLOPs against the formula, and measured memory against the allocator."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorabench.config.experiments import ComputeExperiment, Protocol
from lorabench.config.inputs import PathModel
from lorabench.store.schemas import COMPUTE
from lorabench.training import step_cost
from lorabench.training.loss import Batch
from lorabench.training.step_cost import measure_compute

N = 64


@pytest.fixture
def square(tmp_path):
    """A Llama whose 8 linear layers are all N x N, the unembedding included."""
    sizes = {"vocab_size": N, "hidden_size": N, "intermediate_size": N, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "square")
    return PathModel(kind="path", path=str(tmp_path / "square"), parameters=1, hidden_size=N)


def measured(spec, ranks=(4,), sequence_length=16, **protocol):
    size = {"batch_size": 2, "sequence_length": sequence_length, "repeats": 1}
    experiment = ComputeExperiment(models=["it"], ranks=list(ranks), **size)
    return measure_compute("it", spec, experiment, 1, Protocol(**protocol), torch.device("cpu"))


def ratios(table):
    """Return the counted FLOPs of LoRA divided by those of FullFT, by rank."""
    lora = table[table["method"] == "lora"].set_index("rank")["linear_flops"]
    return (lora / table["linear_flops"][0]).to_dict()


def test_square_layers_cost_the_papers_formula_and_the_table_is_as_documented(square):
    table = measured(square, [1, 64])
    assert list(table.columns) == COMPUTE.names
    written = pa.Table.from_pandas(table, schema=COMPUTE, preserve_index=False)
    assert written["method"].to_pylist() == ["fullft", "lora", "lora"]
    assert written["rank"].to_pylist() == [None, 1, 64]
    assert all(written[name].null_count == 0 for name in COMPUTE.names if name not in ("rank", "placement"))
    assert table["step_s"].min() > 0
    assert set(table["effective_width"]) == {N}
    # 32 tokens go through 8 layers: three products each, two FLOPs per multiply-add.
    assert table["linear_flops"][0] == 32 * 8 * 3 * 2 * N * N
    assert ratios(table) == pytest.approx({rank: 2 / 3 + 2 * rank / N for rank in (1, 64)}, rel=1e-12)
    table = measured(square, include_unembedding=False)
    assert table["effective_width"][0] == pytest.approx(8 * N / 7)
    assert ratios(table) == pytest.approx({4: 2 / 3 + 2 * 4 / (8 * N / 7)}, rel=1e-12)


def test_growth_is_that_of_the_allocator(square, tmp_path):
    """The reference is torch.profiler, which records every block of the CPU's allocator."""
    model, batch = step_cost.load_model(square), torch.arange(32).reshape(2, 16)
    step, _ = step_cost.training_step(model, Batch(batch, batch), Protocol())
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    blocks = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    peak = max(np.cumsum([size for _, size in blocks]))
    assert step_cost.growth(step, torch.device("cpu")) == pytest.approx(peak, rel=0.01)
