"""What the audit says of the layers that LoRA trains, and of settings, in one run and among several."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from lora_advice.audit import check_run, structure
from lora_advice.audit.config import TrainingConfig, say
from lora_advice.audit.settings import compare_runs
from lora_advice.models import facts

PUBLISHED = Path(__file__).parents[3] / "paper_figures/published"
CASES = yaml.safe_load(Path(__file__).with_name("checks.yaml").read_text(encoding="utf-8"))
LLAMA = TrainingConfig("a.yaml", "trl", task="sft", method="lora", model="meta-llama/Llama-3.1-8B", lr=2e-4, rank=16)
LLAMA = replace(LLAMA, alpha=32.0, targets=("all-linear",), lines={"targets": 7, "lr": 3})
MLP = ("gate_proj", "up_proj", "down_proj")


def changed(changes):
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return replace(LLAMA, **fields)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["about"])
def test_what_is_said_of_runs(case):
    runs = [changed(run) for run in case["runs"]]
    findings = [finding for run in runs for finding in check_run(run)] + compare_runs(runs)
    assert [
        f"{finding.level} {finding.code} {finding.path} {finding.line}: {finding.message} "
        f"[{finding.source}; {finding.sure}]"
        for finding in findings
        if finding.code not in ("lr", "rl-lr", "lr-unknown")
    ] == case["says"]


def counted(run):
    model = facts(run.model)
    return structure.trained_parameters(run, model, structure.adapted(run, model))


def test_parameters_are_those_of_the_paper_and_of_peft():
    llama = replace(LLAMA, rank=256, targets=("all-linear", "lm_head"))
    assert counted(llama) == {"attention": 851_968 * 256, "mlp": 1_769_472 * 256, "unembedding": 132_352 * 256}
    moe = replace(LLAMA, model="Qwen/Qwen3-30B-A3B", rank=2, targets=("q_proj", *MLP))
    experts = 48 * 128 * (2 * 2 * (2048 + 2 * 768) + 2 * (768 + 2048))
    assert counted(moe) == {"attention": 48 * 2 * (2048 + 4096), "experts": experts}
    by_parameter = replace(moe, targets=(), target_parameters=("mlp.experts.down_proj",))
    assert counted(by_parameter) == {"experts": 48 * 128 * 2 * (768 + 2048)}


def test_measured_numbers_are_those_that_are_published():
    with (PUBLISHED / "evidence/summary.csv").open() as file:
        summary = {row["measure"]: row for row in csv.DictReader(file) if not row["attribute"]}
    ratio = [math.exp(float(summary["lr_ratio"][end])) for end in ("mean", "low", "high")]
    assert ratio == pytest.approx([14.4, 4.62, 45.1], 0.01)
    whole = say("whole", names="", size="", at="")
    assert "14 [4.6, 45]" in whole.sure
    assert whole.source.startswith(f"optima of {summary['lr_ratio']['k']} sources, ")
    full = changed({"method": "fullft", "rank": None, "path": "full.yaml"})
    (same,) = compare_runs([full, LLAMA])
    assert ("14 times as high" in same.message, same.sure) == (True, "95% interval 4.6 to 45")
    (of_rl,) = compare_runs([replace(run, task="rl") for run in (full, LLAMA)])
    with (PUBLISHED / "evidence/measurements.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["measure"] == "lr_ratio" and row["task"] == "rl"]
    counted = {source: [] for source in ("kenkuuu", "orbit")}
    for row in rows:
        if row["source"] in counted:
            counted[row["source"]].append(float(row["value"]))
    means = [f"{math.exp(sum(values) / len(values)):.2g}" for values in counted.values()]
    assert of_rl.sure == f"in reinforcement learning {' and '.join(means)} were measured"
    growth = [float(summary["gap_growth"][end]) for end in ("mean", "low", "high")]
    assert growth == pytest.approx([-0.005, -0.058, 0.048], abs=0.0006)
    assert "-0.005 nats [-0.058, 0.048]" in say("batch", batch=512).sure
    attention, short = say("attention-only", which="", names="").sure, say("short", steps=60.0).sure
    said = {"laptop": ("{:.3f} [{:.3f}, {:.3f}]", "{:.2g} [{:.2g}, {:.2g}]")}
    said |= {"overnight_first": ("{:.3f} nats [{:.3f}, {:.3f}]", "{:.2g} [{:.2g}, {:.2g}]")}
    for preset, (of_e1, of_b9) in said.items():
        with (PUBLISHED / preset / "claims.csv").open() as file:
            claims = {row["claim_id"]: row for row in csv.DictReader(file)}
        for claim, form, text in (("E1", of_e1, attention), ("B9", of_b9, short)):
            ends = [float(claims[claim][column]) for column in ("estimate", "ci_low", "ci_high")]
            assert form.format(*ends) in text
