"""What the audit says of the layers that LoRA trains, and of settings, in one run and among several."""

import math
import time
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pandas as pd
import pytest
from lora_advice.audit.checks import FOLDER_CHECKS, RUN_CHECKS
from lora_advice.audit.config import Knowledge, TrainingConfig
from lora_advice.audit.settings import (
    RATIO,
    RATIO_HIGH,
    RATIO_LOW,
    check_alpha_lr,
    check_batch,
    check_lr_differs,
    check_precision,
    check_same_lr,
    check_scale,
    check_short_run,
    check_variants,
)
from lora_advice.audit.structure import (
    adapted,
    check_attention_only,
    check_capacity,
    check_experts,
    check_fused,
    check_parameters,
    check_patterns,
    check_unembedding,
    trained_parameters,
)
from lora_advice.finding import Finding
from lora_advice.models import facts
from lora_advice.variants import lr_factor

from ..conftest import REPOSITORY

PUBLISHED = REPOSITORY / "paper_figures/published"
NOTHING = Knowledge()
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LLAMA = TrainingConfig(
    path="a.yaml",
    format="trl",
    task="sft",
    method="lora",
    model="meta-llama/Llama-3.1-8B",
    lr=2e-4,
    rank=16,
    alpha=32.0,
    targets=("all-linear",),
    lines={"targets": 7, "lr": 3},
)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def mixture(model: str, targets: tuple[str, ...], **fields: object) -> list[Finding]:
    return check_experts(replace(LLAMA, model=model, targets=targets, **fields), NOTHING)


@pytest.mark.parametrize(
    ("model", "targets", "framework", "level"),
    [
        # Tried with PEFT 0.21 on tiny models of these families.
        ("Qwen/Qwen3-30B-A3B", (*ATTENTION, *MLP), "trl", None),
        ("Qwen/Qwen3-30B-A3B", ("all-linear",), "trl", None),
        ("Qwen/Qwen3-30B-A3B", (r".*\.(q|k|v|o|gate|up|down)_proj",), "trl", None),
        ("Qwen/Qwen3-30B-A3B", (*ATTENTION, "gate_proj"), "trl", "error"),
        ("Qwen/Qwen3-30B-A3B", ATTENTION, "trl", "warning"),
        ("mistralai/Mixtral-8x7B-v0.1", (*ATTENTION, "w1", "w2", "w3"), "trl", None),
        ("mistralai/Mixtral-8x7B-v0.1", (*ATTENTION, *MLP), "trl", "error"),
        ("openai/gpt-oss-20b", ("all-linear",), "trl", "warning"),
        ("openai/gpt-oss-20b", (*ATTENTION, *MLP), "trl", "error"),
        ("Qwen/Qwen1.5-MoE-A2.7B", (*ATTENTION, *MLP), "trl", "warning"),
        # Axolotl looks for the names of linear layers, among which no expert is.
        ("Qwen/Qwen3-30B-A3B", ("all-linear",), "axolotl", "warning"),
        ("zai-org/GLM-4.5-Air", ("all-linear",), "axolotl", None),
        # LLaMA-Factory has a PEFT that does not know fused experts.
        ("Qwen/Qwen3-30B-A3B", (*ATTENTION, *MLP), "llamafactory", "warning"),
        ("Qwen/Qwen3-30B-A3B", ("all-linear",), "llamafactory", "warning"),
        # Copies of Llama 4 whose experts are modules.
        ("axolotl-quants/Llama-4-Scout-17B-16E-Linearized-bnb-nf4-bf16", (*ATTENTION, *MLP), "axolotl", None),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", (*ATTENTION, *MLP), "axolotl", "warning"),
        # torchtune has LoRA of its own.
        ("llama4_scout_17b_16e", (*ATTENTION, *MLP), "torchtune", None),
        ("llama4_scout_17b_16e", ATTENTION, "torchtune", "warning"),
        # Of an unknown family nothing is said but that attention alone has no experts.
        ("someone/Thing-100B-A10B", (*ATTENTION, *MLP), "trl", None),
        ("someone/Thing-100B-A10B", ATTENTION, "trl", "warning"),
    ],
)
def test_experts(model: str, targets: tuple[str, ...], framework: str, level: str | None) -> None:
    findings = mixture(model, targets, format=framework)
    assert [finding.level for finding in findings] == ([level] if level else [])
    assert all(finding.code == "experts" and finding.line == 7 for finding in findings)


def test_experts_by_their_parameters() -> None:
    parameters = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert mixture("openai/gpt-oss-20b", ATTENTION, target_parameters=parameters) == []
    refused = only(mixture("openai/gpt-oss-20b", ATTENTION, target_parameters=parameters, dropout=0.05))
    assert refused.level == "error"
    assert "lora_dropout 0.05" in refused.message
    assert mixture("openai/gpt-oss-20b", (), target_parameters=parameters) == []
    assert only(mixture("Qwen/Qwen3-30B-A3B", ("all-linear",), dropout=0.1)).level == "error"
    assert mixture("Qwen/Qwen3-30B-A3B", ("all-linear",)) == []


def test_attention_alone() -> None:
    finding = only(check_attention_only(replace(LLAMA, targets=ATTENTION), NOTHING))
    assert (finding.code, finding.level, finding.line) == ("attention-only", "warning", 7)
    finding = only(check_attention_only(replace(LLAMA, targets=None), NOTHING))
    assert "queries and values alone, PEFT's default" in finding.message
    for targets in (("all-linear",), (*ATTENTION, *MLP), MLP, ("q_proj", "in_proj")):
        assert check_attention_only(replace(LLAMA, targets=targets), NOTHING) == []
    assert check_attention_only(replace(LLAMA, method="fullft", targets=ATTENTION), NOTHING) == []
    # Whether the framework's own default is attention alone is not known.
    assert check_attention_only(replace(LLAMA, format="verl", targets=None), NOTHING) == []


def test_parts_of_fused_layers() -> None:
    phi = replace(LLAMA, model="microsoft/Phi-3-mini-4k-instruct", format="trl")
    finding = only(check_fused(replace(phi, targets=("q_proj", "o_proj", "up_proj", "down_proj")), NOTHING))
    assert (finding.code, finding.level) == ("no-effect", "warning")
    assert "q_proj and up_proj match nothing" in finding.message
    assert "qkv_proj and gate_up_proj, and PEFT trains down_proj and o_proj alone" in finding.message
    assert only(check_fused(replace(phi, targets=("q_proj", "v_proj")), NOTHING)).level == "error"
    copied = only(check_fused(replace(phi, targets=("q_proj", "v_proj"), model="me/Phi-3-mini-4k-own"), NOTHING))
    assert (copied.level, copied.sure) == ("warning", "certain unless the copy has them apart, as unsloth's have")
    for other in (
        replace(phi, targets=("all-linear",)),
        replace(phi, targets=ATTENTION, unsloth=True),
        replace(phi, targets=("qkv_proj", "q_proj")),
        replace(phi, targets=ATTENTION, model="unsloth/Phi-3-mini-4k-instruct"),
        replace(LLAMA, targets=ATTENTION),
    ):
        assert check_fused(other, NOTHING) == []


def test_a_regular_expression_names_layers() -> None:
    pattern = r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
    assert adapted(replace(LLAMA, targets=(pattern,)), None).names == {*ATTENTION, *MLP}
    assert adapted(replace(LLAMA, targets=(r".*self_attn.*_proj",)), None).attention_alone
    for unknown in ("*.layers.0.*.linear_qkv", r"vision\..*"):
        assert adapted(replace(LLAMA, targets=(unknown,)), None) is None
        assert check_patterns(replace(LLAMA, targets=(unknown,)), NOTHING) == []


def test_a_regular_expression_that_would_take_years_is_one_sentence() -> None:
    hostile = replace(LLAMA, targets=("q_proj", r"(\w+\.?)+!"))
    started = time.monotonic()
    assert adapted(hostile, None) is None
    finding = only(check_patterns(hostile, NOTHING))
    assert time.monotonic() - started < 20
    assert (finding.code, finding.level, finding.line) == ("not-read", "warning", 7)
    assert finding.message == (
        r"the regular expression '(\\w+\\.?)+!' takes longer than 1 s on 30 names of modules, "
        "so the layers with LoRA are not known"
    )


def test_embedding_and_unembedding() -> None:
    tied = replace(LLAMA, model="meta-llama/Llama-3.2-1B")
    with_head = ("all-linear", "lm_head")
    assert "are one matrix" in only(check_unembedding(replace(tied, targets=with_head), NOTHING)).message
    assert check_unembedding(replace(LLAMA, targets=with_head), NOTHING) == []
    whole = only(check_unembedding(replace(LLAMA, saved_modules=("embed_tokens", "lm_head")), NOTHING))
    assert whole.level == "note"
    assert "(1.05B parameters) are trained whole at LoRA's learning rate 0.0002" in whole.message
    findings = check_unembedding(replace(tied, saved_modules=("embed_tokens", "lm_head")), NOTHING)
    assert [finding.level for finding in findings] == ["warning", "note"]
    assert "(0.53B parameters)" in findings[1].message


def test_parameters_of_llama_are_those_of_the_paper() -> None:
    counted = trained_parameters(replace(LLAMA, rank=256, targets=("all-linear", "lm_head")), facts(LLAMA))
    assert counted == {"attention": 851_968 * 256, "mlp": 1_769_472 * 256, "unembedding": 132_352 * 256}
    assert "0.70B parameters, 8.78% of the model's 8.03B: 0.22B in attention, 0.45B in the MLP" in (
        only(check_parameters(replace(LLAMA, rank=256, targets=("all-linear", "lm_head")), NOTHING)).message
    )


def test_parameters_of_experts_are_those_of_peft() -> None:
    moe = replace(LLAMA, model="Qwen/Qwen3-30B-A3B", rank=2, targets=("q_proj", *MLP))
    experts = 48 * 128 * (2 * 2 * (2048 + 2 * 768) + 2 * (768 + 2048))
    assert trained_parameters(moe, facts(moe)) == {"attention": 48 * 2 * (2048 + 4096), "experts": experts}
    by_parameter = replace(moe, targets=(), target_parameters=("mlp.experts.down_proj",))
    assert trained_parameters(by_parameter, facts(moe)) == {"experts": 48 * 128 * 2 * (768 + 2048)}
    missed = replace(moe, model="openai/gpt-oss-20b", targets=("all-linear",))
    assert set(trained_parameters(missed, facts(missed))) == {"attention"}


@pytest.mark.parametrize("change", [{"rank": None}, {"targets": ("w_q",)}, {"model": "x/y-7b"}])
def test_parameters_are_not_guessed(change: dict[str, object]) -> None:
    config = replace(LLAMA, **change)
    assert check_parameters(config, NOTHING) == []


def test_memory_and_hours_are_bounds() -> None:
    """8 and 16 bytes for each trained parameter; 6 FLOPs for a parameter and token, 4 with frozen weights."""
    said = {"steps": 1000.0, "micro_batch": 8, "max_length": 4096}
    full = only(check_parameters(replace(LLAMA, method="fullft", **said), NOTHING)).message
    hours = 6 * 8.03e9 * 1000 * 8 * 4096 / (0.35 * 989.5e12) / 3600
    assert f"take 64.2 to 128 GB, and activations more; 1000 steps take at most {hours:.2g} hours" in full
    assert full.endswith("of an H100 for each device")
    lora = replace(LLAMA, rank=256, targets=("all-linear", "lm_head"), bits=4, devices=2, **said)
    small = only(check_parameters(lora, NOTHING)).message
    assert f"take {8.03 / 2 + 0.705 * 8:.3g} to {8.03 / 2 + 0.705 * 16:.3g} GB" in small
    assert small.endswith(f"at most {hours * 2 / 3 * 2:.2g} hours of an H100")


def test_capacity() -> None:
    many = Knowledge(completion_tokens=500.0)
    finding = only(check_capacity(replace(LLAMA, examples=1_000_000), many))
    # A unit of rank has 2,621,440 parameters without the unembedding: 500M tokens need 191 of them.
    assert (finding.level, "rank 191 has enough" in finding.message) == ("warning", True)
    assert check_capacity(replace(LLAMA, examples=50_000), many) == []
    bound = replace(LLAMA, steps=10_000.0, micro_batch=32, max_length=4096, packing=True)
    assert only(check_capacity(bound, NOTHING)).level == "note"
    assert check_capacity(replace(bound, packing=False), NOTHING) == []
    assert check_capacity(replace(LLAMA, task="rl", examples=1_000_000), many) == []


def test_scale() -> None:
    assert check_scale(LLAMA, NOTHING) == []
    assert only(check_scale(replace(LLAMA, alpha=0.0), NOTHING)).level == "error"
    assert only(check_scale(replace(LLAMA, alpha=1.0), NOTHING)).code == "scale"
    assert check_scale(replace(LLAMA, method="fullft", alpha=0.0), NOTHING) == []


def test_what_is_known_of_a_variant_is_said_where_it_helps() -> None:
    def said(**changes: Any) -> str:
        return only(check_variants(replace(LLAMA, **changes), NOTHING)).message

    # As alpha 128: the factor is the square root of the rank, to the powers 3/4, 1/2 and 1.
    rslora = said(rank=64, alpha=16.0, rslora=True)
    assert "as alpha 128 without it: the optimal learning rate is 4.8 (2.8 to 8) times lower" in rslora
    assert "of A is 8 (4 to 16) times lower than that of LoRA" in said(lr_ratio=16.0)
    assert f"DoRA was {lr_factor('dora', 16)}; LoRA's can be kept" in said(dora=True)
    assert f"PiSSA was {lr_factor('pissa', 16)}; it depends on the weights" in said(variant="pissa")
    # Nothing follows from 4 bits, and nothing can be done without a learning rate or without LoRA.
    for changes in ({"bits": 4}, {"dora": True, "lr": None}, {"dora": True, "method": "fullft"}, {"variant": "eva"}):
        assert check_variants(replace(LLAMA, **changes), NOTHING) == []


def test_short_runs_and_large_batches() -> None:
    assert "in 60 steps" in only(check_short_run(replace(LLAMA, steps=60.0), NOTHING)).message
    counted = replace(LLAMA, examples=1000, epochs=2.0, micro_batch=4, accumulation=8)
    assert "in 62 steps" in only(check_short_run(counted, NOTHING)).message
    for config in (LLAMA, replace(LLAMA, steps=100.0), replace(LLAMA, steps=60.0, method="fullft")):
        assert check_short_run(config, NOTHING) == []
    assert only(check_batch(replace(LLAMA, global_batch=512), NOTHING)).level == "note"
    assert check_batch(replace(LLAMA, global_batch=128), NOTHING) == []
    assert check_batch(replace(LLAMA, global_batch=512, task="rl"), NOTHING) == []


def test_precision() -> None:
    full = replace(LLAMA, method="fullft", rank=None, alpha=None, targets=None)
    assert only(check_precision(replace(full, bits=4), NOTHING)).level == "error"
    assert check_precision(replace(LLAMA, bits=4), NOTHING) == []
    pure = replace(full, precision="bf16", rounded=True, lr=2e-5)
    note = only(check_precision(pure, NOTHING))
    assert (note.level, "keeps 37% of steps of 2e-05" in note.message) == ("note", True)
    assert only(check_precision(replace(pure, lr=1e-6), NOTHING)).level == "warning"
    for lr in (1e-4, 0.0, -1e-5, math.inf, math.nan):
        assert check_precision(replace(pure, lr=lr), NOTHING) == []
    # Products in bf16 lose nothing of a step.
    assert check_precision(replace(pure, rounded=False), NOTHING) == []


def test_the_same_learning_rate_for_both_methods() -> None:
    full = replace(LLAMA, path="full.yaml", method="fullft", model="/tmp/Llama-3.1-8B/", rank=None)
    finding = only(check_same_lr([full, LLAMA], NOTHING))
    assert (finding.path, finding.line, finding.level) == ("a.yaml", 3, "warning")
    assert "full.yaml" in finding.message
    for other in (replace(full, lr=2e-5), replace(full, model="Qwen/Qwen3-8B"), replace(full, task="rl")):
        assert check_same_lr([other, LLAMA], NOTHING) == []
    assert check_same_lr([replace(full, model=None), replace(LLAMA, model=None)], NOTHING) == []


def test_alpha_changed_and_the_learning_rate_not() -> None:
    more = replace(LLAMA, path="b.yaml", rank=64, alpha=128.0)
    finding = only(check_alpha_lr([more, LLAMA], NOTHING))
    assert (finding.path, finding.level) == ("b.yaml", "warning")
    assert "2.8 (2 to 4) times lower" in finding.message
    # The rank alone does not move the optimum, and rsLoRA's scale counts.
    assert check_alpha_lr([replace(more, alpha=32.0), LLAMA], NOTHING) == []
    assert check_alpha_lr([replace(more, lr=1e-4), LLAMA], NOTHING) == []
    assert only(check_alpha_lr([replace(LLAMA, path="c.yaml", rslora=True), LLAMA], NOTHING)).path == "c.yaml"


def test_learning_rates_of_the_same_setting_far_apart() -> None:
    low = replace(LLAMA, path="low.yaml", lr=2e-5, lines={})
    high = replace(LLAMA, lr=2e-3)
    finding = only(check_lr_differs([low, LLAMA, high], NOTHING))
    assert (finding.path, "0.002 is 100 times that of low.yaml" in finding.message) == ("a.yaml", True)
    assert check_lr_differs([low, replace(high, alpha=64.0)], NOTHING) == []
    assert check_lr_differs([low, replace(high, method="fullft")], NOTHING) == []
    assert check_lr_differs([LLAMA, replace(LLAMA, lr=1e-3)], NOTHING) == []
    # A reward model and DPO are both preference training.
    assert check_lr_differs([replace(low, task="preference"), replace(high, task="preference")], NOTHING) == []


def test_measured_numbers_are_those_that_are_published() -> None:
    summary = pd.read_csv(PUBLISHED / "evidence/summary.csv").set_index("measure")
    pooled = summary[summary["attribute"].isna()]
    ratio = pooled.loc["lr_ratio"]
    assert [math.exp(ratio[end]) for end in ("mean", "low", "high")] == pytest.approx(
        [RATIO, RATIO_LOW, RATIO_HIGH], 0.1
    )
    growth = pooled.loc["gap_growth"]
    assert [growth[end] for end in ("mean", "low", "high")] == pytest.approx([-0.002, -0.075, 0.070], abs=0.003)
    assert "-0.002 nats [-0.075, 0.070]" in check_batch(replace(LLAMA, global_batch=512), NOTHING)[0].sure
    attention = check_attention_only(replace(LLAMA, targets=ATTENTION), NOTHING)[0].sure
    short = check_short_run(replace(LLAMA, steps=60.0), NOTHING)[0].sure
    said = {"laptop": ("{:.3f} [{:.3f}, {:.3f}]", "{:.2g} [{:.2g}, {:.2g}]")}
    said |= {"overnight": ("{:.3f} nats [{:.3f}, {:.3f}]", "{:.2g} [{:.2g}, {:.2g}]")}
    for preset, (of_e1, of_b9) in said.items():
        claims = pd.read_csv(PUBLISHED / preset / "claims.csv").set_index("claim_id")
        ends = claims[["estimate", "ci_low", "ci_high"]]
        assert of_e1.format(*ends.loc["E1"]) in attention
        assert of_b9.format(*ends.loc["B9"]) in short


def test_no_value_stops_the_checks() -> None:
    values = {
        "model": ("Qwen/Qwen3-30B-A3B", "meta-llama/Llama-3.2-1B", "x/0x0b", "a0b-0b", "", "\0", "a" * 5000, None),
        "targets": ((), ("all-linear",), ("*bad(",), ("",), ("w1", "gate_proj"), ("lm_head", "q_proj"), None),
        "target_parameters": ((), ("experts.gate_up_proj",), ("",)),
        "rank": (0, -1, 10**9, None),
        "alpha": (0.0, -1.0, 1e-300, math.inf, math.nan, None),
        "lr": (0.0, -1.0, math.inf, math.nan, None),
        "steps": (0.0, 1e-300, math.inf, math.nan, None),
        "global_batch": (0, 10**9, None),
        "rslora": (True, False),
        "dora": (True, False),
        "lr_ratio": (16.0, 0.0, -1.0, None),
        "variant": ("pissa", "", "eva", None),
        "method": ("lora", "fullft"),
        "task": ("sft", "rl"),
        "format": ("axolotl", "trl", "llamafactory", "torchtune"),
    }
    random = Random(1)
    base = replace(LLAMA, examples=10, epochs=1.0, max_length=8, packing=True, saved_modules=("lm_head",))
    odd = [replace(base, **{name: random.choice(options) for name, options in values.items()}) for _ in range(2000)]
    for config in odd:
        # The first, of learning rates, reads tables and has tests of its own.
        for check in (*RUN_CHECKS[1:], *(partial(_among, other=odd[0], check=check) for check in FOLDER_CHECKS)):
            for finding in check(config, Knowledge(completion_tokens=5.0)):
                assert finding.message


def _among(config: TrainingConfig, known: Knowledge, other: TrainingConfig, check: object) -> list[Finding]:
    return check([config, other, replace(config, path="c.yaml", alpha=64.0)], known)
