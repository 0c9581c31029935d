"""The cost of a training step: counted FLOPs against the formula, and measured memory against the allocator."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import PathModel
from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.store.schemas import COMPUTE
from lorabench.training import step_cost
from lorabench.training.step_cost import compute_table, effective_width, measure_compute

RANKS = [1, 8, 64]
N = 64


def square(tmp_path, layers=2):
    """Save a Llama whose linear layers are all N x N, the unembedding included."""
    config = LlamaConfig(
        vocab_size=N,
        hidden_size=N,
        intermediate_size=N,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "square")
    return PathModel(kind="path", path=str(tmp_path / "square"), parameters=1, hidden_size=N)


def measured(spec, ranks=RANKS, placement="all", batch_size=2, sequence_length=16, repeats=1, **protocol):
    return measure_compute(
        "it", spec, ranks, placement, batch_size, sequence_length, repeats, threads=1, protocol=Protocol(**protocol)
    )


def ratios(rows):
    """Return the counted FLOPs of LoRA divided by those of FullFT, by rank."""
    return {row["rank"]: row["linear_flops"] / rows[0]["linear_flops"] for row in rows[1:]}


def formula(rows):
    return {row["rank"]: 2 / 3 + 2 * row["rank"] / row["effective_width"] for row in rows[1:]}


def test_square_layers_cost_the_papers_formula(tmp_path):
    rows = measured(square(tmp_path))
    assert [(row["method"], row["rank"]) for row in rows] == [("fullft", None)] + [("lora", rank) for rank in RANKS]
    assert {row["effective_width"] for row in rows} == {N}
    # 32 tokens go through 2 x 7 layers and the unembedding: three products each, two FLOPs per multiply-add.
    assert rows[0]["linear_flops"] == 32 * 15 * 3 * 2 * N * N
    assert ratios(rows) == pytest.approx({rank: 2 / 3 + 2 * rank / N for rank in RANKS}, rel=1e-12)


def test_flops_are_counted_without_computing(tmp_path):
    """The larger batch would take 4 GB for one layer's attention scores alone."""
    model = step_cost.load_model(square(tmp_path))
    few, many = (torch.zeros(rows, 64, dtype=torch.long) for rows in (2, 1 << 17))
    counted, scaled = (step_cost.count_flops(model, inputs, inputs, bf16=True) for inputs in (few, many))
    assert scaled == tuple(count << 16 for count in counted)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("placement", "unembedding"), [("attn", True), ("mlp", False), ("all", False)])
def test_the_formula_holds_in_every_placement(tmp_path, placement, unembedding):
    rows = measured(square(tmp_path), ranks=[4], placement=placement, include_unembedding=unembedding)
    adapted = {"attn": 8, "mlp": 6, "all": 14}[placement] + unembedding
    assert rows[0]["effective_width"] == pytest.approx(15 * N / adapted)
    assert ratios(rows) == pytest.approx(formula(rows), rel=1e-12)


def test_a_frozen_embedding_alone_would_save_gradients_that_the_formula_has(tmp_path, monkeypatch):
    spec = square(tmp_path, layers=1)
    monkeypatch.setattr(LlamaForCausalLM, "enable_input_require_grads", lambda model: None)
    monkeypatch.setattr(LlamaForCausalLM, "disable_input_require_grads", lambda model: None)
    rows = measured(spec, ranks=[1])
    # Queries, keys and values of the first block save the gradient of their input, in W and in A.
    saved = 3 * (N * N + N) / (8 * 3 * N * N)
    assert ratios(rows)[1] == pytest.approx(formula(rows)[1] - saved)
    assert ratios(rows)[1] < 0.9 * formula(rows)[1]


def test_attention_is_in_the_total_and_alike_in_all_arms(tmp_path):
    short, long = (measured(square(tmp_path), batch_size=1, sequence_length=length) for length in (16, 32))
    rest = [{row["total_flops"] - row["linear_flops"] for row in rows} for rows in (short, long)]
    assert [len(alike) for alike in rest] == [1, 1]
    # Per layer there are two products forward and four backward, each 2 s^2 N, and a few for rotary positions.
    for (products,), length in zip(rest, (16, 32), strict=True):
        assert products == pytest.approx(2 * 6 * 2 * length**2 * N, rel=0.01)


def test_measuring_leaves_the_weights_that_the_arms_share_as_they_are(tmp_path, monkeypatch):
    loaded = []
    original = step_cost.load_model
    monkeypatch.setattr(step_cost, "load_model", lambda spec: loaded.append(original(spec)) or loaded[-1])
    spec = square(tmp_path)
    measured(spec, ranks=[2])
    [used] = loaded
    fresh = original(spec)
    assert all(torch.equal(a, b) for a, b in zip(used.parameters(), fresh.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in used.parameters())


def test_growth_is_that_of_the_allocator(tmp_path):
    """The reference is torch.profiler, which records every block of the CPU's allocator."""
    model = step_cost.load_model(square(tmp_path))
    batch = torch.arange(32).reshape(2, 16)
    arm = step_cost._Arm(None, model, batch, batch, Protocol())
    arm.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        arm.step()
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    blocks = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    allocated = peak = 0
    for _, size in blocks:
        allocated += size
        peak = max(peak, allocated)
    assert step_cost.growth(arm.step, torch.device("cpu")) == pytest.approx(peak, rel=0.01)


def test_memory_of_fullft_has_gradients_and_state_of_all_weights(tmp_path):
    # With one short sequence activations are small; each trained weight has two numbers of AdamW and a gradient.
    fullft, lora = measured(square(tmp_path), ranks=[1], batch_size=1, sequence_length=2)
    weights = 4 * fullft["base_params"]
    assert fullft["trainable_params"] == fullft["base_params"] == lora["base_params"]
    assert 4 * weights < fullft["peak_mem_bytes"] < 4.5 * weights
    trained = 4 * lora["trainable_params"]
    assert weights + 4 * trained < lora["peak_mem_bytes"] < weights + 4 * trained + 0.5 * weights


def test_arms_take_turns_and_the_median_counts_after_the_warm_up(monkeypatch):
    order, now = [], [0.0]
    seconds = {"a": iter([90, 80, 3, 1, 2]), "b": iter([70, 60, 5, 4, 30])}

    def step(name):
        def run():
            order.append(name)
            now[0] += next(seconds[name])

        return run

    monkeypatch.setattr(step_cost.time, "perf_counter", lambda: now[0])
    assert step_cost._interleaved([step("a"), step("b")], 3, torch.device("cpu")) == [2, 5]
    assert "".join(order) == "ab" * 5


def test_what_can_not_be_measured_is_said(tmp_path):
    with pytest.raises(UserError, match="sequence_length = 65: model 'it' takes at most 64 tokens"):
        measured(square(tmp_path), sequence_length=65)
    model = step_cost.load_model(square(tmp_path))
    model.config.num_experts_per_tok = 2
    with pytest.raises(UserError, match="LlamaForCausalLM has experts"):
        effective_width(model, "all", include_unembedding=True)


@pytest.fixture
def preset(raw_preset, write_preset):
    def make():
        fields = {"models": ["tiny"], "ranks": [1, 2], "batch_size": 1, "sequence_length": 8, "repeats": 1}
        raw_preset["experiments"] |= {"compute": fields}
        return load_preset(write_preset(raw_preset))

    return make


def test_the_table_of_a_preset_has_the_documented_columns(preset):
    table = compute_table(preset(), "tiny")
    assert list(table.columns) == COMPUTE.names
    written = pa.Table.from_pandas(table, schema=COMPUTE, preserve_index=False)
    assert written["rank"].to_pylist() == [None, 1, 2]
    assert all(written[name].null_count == 0 for name in COMPUTE.names if name not in ("rank", "placement"))
    assert min(written["step_s"].to_pylist()) > 0
