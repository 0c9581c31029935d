"""What learning rates would cost, on made-up optima and curvatures whose answer is known, and the findings of it."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
from lora_advice.audit.config import TrainingConfig
from lora_advice.audit.lr import SURE, level, lr_findings
from lora_advice.audit.regret import EVIDENCE, LrEvidence, Place, shipped_evidence
from lora_advice.models import ModelFacts
from lora_advice.variants import lr_factor

MODEL = ModelFacts("m", "llama", 2000, "made up")
SHIPPED = json.loads(EVIDENCE.read_text())
BATCH, STEPS = (int(SHIPPED["reference"][name]) for name in ("batch_size", "steps"))
PLACE = Place("llama", 2000.0, "lora", False, BATCH, STEPS)
# At the pivot the law of LoRA is 5e-4, and so are all optima of SFT here; those of RL are a hundredth.
BEST = 5e-4
RUN = TrainingConfig("a.yaml", "made-up", task="sft", method="lora", lr=BEST, global_batch=BATCH, steps=STEPS)
RUN = replace(RUN, rank=10**6, alpha=32, lines={"lr": 7})


@cache
def evidence(curvature=0.1, spread=0.22):
    """Return made-up evidence: optima whose logarithms differ by `spread`, and one curvature on both sides.

    The optima grow with the batch size to the power 0.3.
    """
    measured = {"width": [2000], "batch_size": [BATCH], "steps": [STEPS]}
    pool = {"sources": 24, "measured": measured, "shares": [1.0], "variances": [[spread**2, 0, 0, 0, 0, 0]]}
    optima = {
        task: {method: pool | {"means": [[shift, 0.3, 0]]} for method in ("lora", "fullft")}
        for task, shift in (("sft", 0.0), ("rl", -math.log(100)))
    }
    columns = [f"{unit}_{side}" for unit in ("share", "loss") for side in ("below", "above")]
    curvatures = {task: dict.fromkeys(columns, (math.log(curvature), 0.0)) for task in ("sft", "rl")}
    return LrEvidence(SHIPPED | {"optima": optima, "curvatures": curvatures})


def found(known=None, base=MODEL, **changes):
    findings = lr_findings(replace(RUN, **changes), base, known or evidence())
    assert len(findings) == 1
    return findings[0]


@pytest.mark.parametrize("x", [-2.0, 0.0, 1.5])
def test_the_expected_regret_is_that_of_the_parabola(x):
    verdict = evidence().verdict(math.log(BEST) + x, PLACE)
    assert verdict.log_factor == pytest.approx(x, abs=2e-3)
    # The variance between sources adds to the squared distance.
    sd = math.log(verdict.recommended.high / verdict.recommended.low) / (2 * 1.96)
    assert sd == pytest.approx(math.log(1.25), rel=0.25)
    assert verdict.loss.mean == pytest.approx(0.1 * (x**2 + sd**2), rel=0.15)
    assert verdict.share.mean == pytest.approx(1 - math.exp(-0.1 * (x**2 + sd**2)), rel=0.15)
    assert verdict.recommended_share == pytest.approx(1 - math.exp(-0.1 * sd**2), rel=0.15)
    assert verdict.share.low <= verdict.share.mean <= verdict.share.high
    assert (verdict.share.low > 0) == verdict.outside_95 == (x != 0)


def test_levels():
    assert found().level == "note"
    assert found().line == 7
    error = found(lr=BEST / 30)
    assert (error.code, error.level) == ("lr", "error")
    assert "30 times lower than the recommended 0.0005" in error.message
    assert "of what training gains (the recommended one 0%)" in error.message
    # Where LRs hardly matter, a distance that chance does not explain is no error.
    assert found(evidence(curvature=1e-5), lr=BEST / 30).level == "warning"
    # Where sources differ by a factor of ten, the same LR may be right.
    assert found(evidence(spread=2.0), lr=BEST / 10).level == "note"


def test_alpha_and_rank_move_the_recommendation():
    shift = evidence().shift
    assert shift(32, None) == (0.0, 0.0)
    assert shift(64, 10**6)[0] == pytest.approx(0.75 * math.log(2), abs=1e-4)
    assert shift(32, 1)[0] == pytest.approx(0.75 * math.log(2.2))
    assert shift(None, 16) == (0.0, pytest.approx(0.75 * math.log(2)))
    assert found(lr=BEST / 2**0.75, alpha=64).message.startswith("the learning rate 0.000297302 of LoRA is about")
    # Alpha is no matter of full fine-tuning.
    assert "is about" in found(lr=BEST / 10, alpha=64, method="fullft").message


PISSA = lr_factor("pissa", 144).value
VARIANTS = {
    # rsLoRA's alpha / sqrt(r) is the usual scale with sqrt(r) times the alpha.
    "rsLoRA": ({"rslora": True}, 12**-0.75),
    "LoRA+": ({"lr_ratio": 10.0}, 10**-0.75),
    "DoRA": ({"dora": True}, 1.0),
    "QLoRA": ({"bits": 4}, 1.0),
    "PiSSA": ({"variant": "pissa_niter_4"}, PISSA),
    "rsLoRA and PiSSA and QLoRA": ({"rslora": True, "variant": "pissa", "bits": 4}, 12**-0.75 * PISSA),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_judged_by_its_own_best_learning_rate(name):
    changes, factor = VARIANTS[name]
    plain = found(rank=144)
    variant = found(rank=144, lr=BEST * factor, **changes)
    assert variant.message.startswith(f"the learning rate {BEST * factor:g} of {name} is about the recommended")
    clause = "as for LoRA" if factor == 1 else f"which is {factor:.2g} times LoRA's"
    assert f", {clause}; it is" in variant.message
    ends = [float(finding.sure.split()[place]) for finding in (plain, variant) for place in (-3, -1)]
    low, high, own_low, own_high = ends
    # What depends on the weights is known less well.
    if "variant" in changes:
        assert own_high / own_low > 1.2 * high / low
    else:
        assert [own_low, own_high] == pytest.approx([low * factor, high * factor], rel=0.04)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"task": "preference"}, "preference"),
        ({"method": None}, "does not say"),
        ({"optimizer": "lion_8bit"}, "lion_8bit"),
        ({"variant": "eva"}, "of the variant eva"),
        ({"rslora": True, "rank": -1}, "does not say the rank"),
        ({"base": replace(MODEL, width=256)}, "a width near 256 in supervised"),
    ],
)
def test_nothing_is_said_where_nothing_was_measured(changes, why):
    finding = found(**changes)
    assert (finding.code, finding.level) == ("lr-unknown", "note")
    assert why in finding.message


def test_a_batch_size_beyond_the_measured_ones_is_extrapolated():
    # The optima here grow as the batch size to the power 0.3, and of what is too low an error becomes a warning.
    small = {"global_batch": 1, "steps": None}
    finding = found(lr=BEST / 100, **small)
    assert finding.level == "warning"
    assert f"than the recommended {BEST / BATCH**0.3:.2g}" in finding.message
    assert "a batch size near 1 in supervised fine-tuning, so the interval is an extrapolation" in finding.sure
    assert found(lr=BEST / 100, global_batch=BATCH, steps=None).level == "error"
    assert found(lr=BEST * 100, **small).level == "error"
    # Of the sources that there are, the doubt about the power grows with the distance.
    llama, shipped = ModelFacts("m", "llama", 4096, "made up"), shipped_evidence()

    def interval(batch):
        place = Place("llama", 4096.0, "lora", True, batch, math.nan)
        return shipped.verdict(math.log(5e-7), place, *shipped.shift(32, 16)).recommended

    ends = {batch: interval(batch) for batch in (8.0, 128.0)}
    low, high = ends[8.0].mean / ends[8.0].low, ends[8.0].high / ends[8.0].mean
    assert low * high > 1.25 * ends[128.0].high / ends[128.0].low
    pool = SHIPPED["optima"]["rl"]["lora"]
    power = sum(share * means[1] for share, means in zip(pool["shares"], pool["means"], strict=True))
    assert 0.25 < power < 0.45
    assert ends[8.0].mean / ends[128.0].mean == pytest.approx(16**-power, rel=0.02)
    run = {"task": "rl", "rank": 16, "group_size": 8, "steps": None}
    levels = {lr: found(shipped, llama, lr=lr, global_batch=1, **run).level for lr in (5e-7, 2e-5)}
    assert levels == {5e-7: "warning", 2e-5: "note"}


def test_a_task_that_is_not_said_counts_as_the_more_lenient_one():
    # The best LR of RL is here a hundredth of that of SFT; in between both are wrong, and at 100 times as high too.
    unknown = {"task": None, "global_batch": None, "micro_batch": BATCH, "devices": 1}
    assert found(lr=BEST, **unknown).level == "note"
    assert "the more lenient one counts, supervised fine-tuning; --task says" in found(lr=BEST, **unknown).sure
    assert "counts, reinforcement learning" in found(lr=BEST / 100, **unknown).sure
    high = found(lr=BEST * 100, **unknown)
    assert (high.code, high.level) == ("lr", "error")
    # What is too low for both may be right for preference training.
    low = found(lr=BEST / 10_000, **unknown)
    assert low.level == "note"
    assert low.sure.endswith("it may be preference training, of which nothing is known")
    assert found(lr=BEST / 10_000, **unknown | {"task": "sft"}).level == "error"
    full = {"method": "fullft", "rank": None, "alpha": None, "micro_batch": 2}
    assert found(shipped_evidence(), lr=1e-3, task=None, global_batch=None, steps=None, **full).level == "error"


def test_outside_its_interval_an_lr_of_full_fine_tuning_is_an_error_and_one_of_lora_if_it_costs_more_than_a_margin():
    for width, rl, low in ((4096, False, "warning"), (4096, True, "error"), (1024, False, "warning")):
        for method, below in (("fullft", "error"), ("lora", low)):
            own = Place("llama", float(width), method, rl, 128.0, math.nan)
            best = shipped_evidence().verdict(0.0, own).recommended

            def judged(end, factor, own=own, best=best):
                lr = getattr(best, end) * factor
                return level(shipped_evidence().verdict(math.log(lr), own), own)

            assert [judged("high", 1.05), judged("high", 10.0), judged("low", 0.1)] == ["error"] * 3
            assert (judged("low", 0.95), judged("mean", 1.0)) == (below, "note")
    # Within its interval a low one of full fine-tuning is nothing in RL, where optima differ most.
    place = Place("llama", 4096.0, "fullft", True, 128.0, math.nan)
    best = shipped_evidence().verdict(0.0, place).recommended
    low, high = (shipped_evidence().verdict(math.log(end), place) for end in (best.low * 1.05, best.high / 1.05))
    for verdict, said in ((low, "note"), (high, "warning")):
        assert verdict.outside_80
        assert not verdict.outside_95
        assert verdict.p_margin > SURE
        assert level(verdict, place) == said


def test_what_is_not_said_widens_the_interval():
    def width(**changes):
        ends = found(**changes).sure.split("; ")[0].split()
        return float(ends[-1]) / float(ends[-3])

    assert width(steps=None) > width()
    assert width(global_batch=None) > width()
    assert width(base=None) > width(base=replace(MODEL, width_error=0.2)) > width()
    assert width(alpha=None) > width()
    assert lr_findings(replace(RUN, lr=None), MODEL, evidence()) == []


def test_reinforcement_learning_at_a_learning_rate_of_supervised_fine_tuning():
    rl = {"task": "rl", "global_batch": BATCH // 8, "group_size": 8}
    # 16 prompts with 8 responses each, and 16 responses on each of 8 devices.
    assert found(**rl).sure == found(**rl | {"global_batch": None, "micro_batch": BATCH // 8, "devices": 8}).sure
    assert "the batch size is not said" in found(**rl | {"group_size": None}).sure
    finding = found(lr=BEST, **rl)
    assert (finding.code, finding.level) == ("rl-lr", "error")
    assert "usual in supervised" in finding.message
    assert found(lr=BEST / 100, **rl).code == "lr"
    assert found(lr=BEST * 100, **rl).code == "lr"
    # rsLoRA is LoRA with another alpha; of PiSSA nothing is known but in supervised fine-tuning.
    both = {"rslora": True, "variant": "pissa"}
    assert "the learning rate of PiSSA over LoRA's was measured in supervised fine-tuning" in found(**rl, **both).sure
    assert "PiSSA" not in found(**both).sure


def test_the_shipped_evidence_on_an_ordinary_configuration():
    llama = ModelFacts("meta-llama/Llama-3.1-8B", "llama", 4096, "made up")
    run = {"global_batch": 32, "steps": 1000, "rank": 16}
    levels = {lr: found(shipped_evidence(), llama, lr=lr, **run).level for lr in (2e-4, 2e-7)}
    assert levels == {2e-4: "note", 2e-7: "error"}
    # Far above the optimum of full fine-tuning runs may diverge, also where the file hardly says more.
    full = {"method": "fullft", "global_batch": None, "micro_batch": 2, "steps": None}
    levels = {lr: found(shipped_evidence(), llama, lr=lr, **full).level for lr in (2e-5, 1e-3)}
    assert levels == {2e-5: "note", 1e-3: "error"}
