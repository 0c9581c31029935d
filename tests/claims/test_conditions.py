"""Conditions say what runs lack, and a claim whose conditions are not met has the verdict `setting not met`."""

from dataclasses import replace

import pandas as pd
import pytest

from lorabench.analysis.arms import in_experiments
from lorabench.analysis.estimate import student
from lorabench.analysis.finding import Finding, decide
from lorabench.analysis.rules import Within
from lorabench.claims import scope
from lorabench.claims.batch_size import large_batches
from lorabench.claims.claim import Claim, Evidence
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.loading import load_preset
from lorabench.planning.plan import make_plan
from lorabench.store.checks import is_rl
from lorabench.store.tables import Tables

PRESETS = ("laptop", "laptop_more", "long_runs", "lr_ratio", "overnight", "smollm2", "first_gpu", "core", "paper")
RUNS = pd.DataFrame(
    {
        "run_id": ["a", "b", "c"],
        "model": ["small", "small", "large"],
        "method": ["fullft", "lora", "lora"],
        "rank": pd.array([None, 4, 4], "Int64"),
        "placement": [None, "all", "all"],
        "batch_size": [8, 32, 32],
        "steps": [50, 12, 12],
        "lr": [1e-3, 1e-3, 2e-3],
        "hidden_size": [128, 128, 2048],
        "base_params": [800_000, 800_000, 1_000_000_000],
    }
).assign(dataset="worked", data_kind="worked", seed=0, status="done", final_valid_nll=1.0, final_test_nll=1.0)
LENGTHS = {"step": [1, 2], "value": [3.0, 6.0]}
CURVES = pd.DataFrame(LENGTHS).assign(run_id="a", split="train", metric="response_length")


def evidence(runs=RUNS, curves=CURVES):
    return Evidence(runs, curves, pd.DataFrame(), pd.DataFrame())


def test_conditions_say_what_there_is_instead():
    assert scope.whole_runs.instead(evidence()) == "at most 50 steps"
    assert scope.whole_runs.instead(evidence(RUNS.assign(steps=[1000, 12, 12]))) is None
    assert scope.widths(2048, 2, ()).instead(evidence()) == "hidden sizes 128, 2048"
    assert scope.response_length(8, ()).instead(evidence()) == "4.5 tokens on average"
    assert scope.response_length(4, ()).instead(evidence()) is None
    # Batches are large over a range and for some steps.
    assert large_batches.instead(evidence()) == "8 to 32, with 12 steps at 32"
    assert large_batches.instead(evidence(RUNS.assign(batch_size=[2, 32, 32], steps=19))) is None
    # Text is natural unless all of it is known to be generated.
    assert scope.natural_text.instead(evidence()) == "text that a program generated"
    assert scope.natural_text.instead(evidence(RUNS.assign(data_kind=["worked", "hub", None]))) is None


def judged(judge, *needed, **fields):
    """Judge a claim with some conditions and other fields on RUNS."""
    texts = dict.fromkeys(("statement", "criterion", "needs"), "A text")
    claim = Claim(id="X1", judge=judge, conditions=needed, experiments=("rank",), **texts, **fields)
    return judge_claims(Tables(RUNS, pd.DataFrame()), [claim]).iloc[0]


def test_a_claim_without_its_setting_keeps_its_numbers_and_says_what_is_missing_and_where_it_is():
    measured = Finding("contradicted", "the gap is 0.1 nats", 0.1, run_ids=("a", "c"))
    two_widths = scope.widths(128, 2, ("paper",))
    row = judged(lambda evidence: measured, scope.whole_runs, two_widths)
    assert row["verdict"] == "setting not met"
    instead = "here at most 50 steps; the preset long_runs, first_gpu, core or paper meets it"
    assert row["missing"] == f"runs of 1,000 steps or more ({instead})"
    assert (row["estimate"], "the gap is 0.1 nats" in row["reason"]) == (0.1, True)
    assert row["scope"] == "0.80M to 1.00B parameters, 12 to 50 steps, worked"
    # A condition that is met changes nothing, and what is not tested stays so.
    near = decide(Within.margin(0.01), student(0.0082, 0.001, 20, "near the margin", 6), "all well", ["a"])
    row = judged(lambda evidence: near, two_widths)
    assert (row["verdict"], row["p_again"] < 0.8) == ("confirmed", True)
    row = judged(lambda evidence: Finding("not tested", "no runs of LoRA"), scope.whole_runs)
    assert (row["verdict"], row["missing"]) == ("not tested", None)


def test_what_fails_on_models_below_1b_alone_is_not_seen_here():
    small, large = Finding("contradicted", "", run_ids=("a",)), Finding("contradicted", "", run_ids=("a", "c"))
    assert judged(lambda evidence: small)["verdict"] == "not seen here"
    assert judged(lambda evidence: large)["verdict"] == "contradicted"
    # A derivation is about every model, and without runs the size is not known.
    assert judged(lambda evidence: small, kind="derivation")["verdict"] == "contradicted"
    assert judged(lambda evidence: replace(small, run_ids=()))["verdict"] == "contradicted"


@pytest.mark.slow
def test_presets_meet_the_conditions_that_claims_say_they_meet():
    planned = {}
    for name in PRESETS:
        preset = load_preset(name)
        table = pd.DataFrame(make_plan(preset).rows())
        planned[name] = table.assign(data_kind=[preset.sources[dataset].kind for dataset in table["dataset"]])
    kinds = ("runs of", "batch sizes", "sweeps of", "natural text", "LoRA ranks")
    for claim in CLAIMS:
        for condition in claim.conditions:
            alpha = condition.text.startswith("LoRA with")
            if not alpha and not condition.text.startswith(kinds):
                continue
            meeting = []
            for name, rows in planned.items():
                chosen = rows[in_experiments(rows, claim.experiments) & (is_rl(rows) == (claim.task == "rl"))]
                # Adapters that store random facts have no learning curve of full fine-tuning beside them.
                chosen = chosen[chosen["data_kind"] != "facts"]
                if len(chosen) and condition.instead(evidence(chosen, pd.DataFrame())) is None:
                    meeting.append(name)
            # Every preset has the paper's alpha; those that are named have the experiments of each claim.
            stated = meeting if alpha and {*condition.presets} <= {*meeting} else condition.presets
            assert (claim.id, sorted(stated)) == (claim.id, sorted(meeting))
