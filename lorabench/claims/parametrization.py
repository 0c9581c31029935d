"""Claims C4 and C9 to C11: the factor 1/r, other values of alpha and LR ratio, and what A and B do in training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import STANDARD, arm_label, each_arm, rows_of
from lorabench.analysis.comparison import Comparison
from lorabench.analysis.early import train_curves
from lorabench.analysis.finding import (
    MIN_SEEDS,
    SIGMAS,
    Finding,
    UnjudgedError,
    Verdict,
    all_of,
    equality_problems,
    finding,
    nats,
    noise_problems,
    sigma_text,
    together,
    within,
)
from lorabench.analysis.gaps import best_losses, gap, mean_interval
from lorabench.analysis.invariances import (
    CONFIGURATION,
    PAIR_SETTING,
    RULES,
    descent_ratios,
    first_descents,
    fixed_a_controls,
    step_sizes,
    update_growth,
    with_lr_grid,
)
from lorabench.analysis.noise import seed_noise, sigma_of
from lorabench.analysis.slopes import log_log
from lorabench.claims.claim import Claim
from lorabench.claims.evidence import over
from lorabench.claims.scopes import Scoped, on_lora
from lorabench.utils.formats import fixed_interval

FLAT_BAND = (0.95, 1.05)
"""The ratios of two first descents that count as equal."""

HALF = 0.5
"""The share of layers above which B has the larger norm in most layers."""

# First descents are compared between runs that agree in these columns.
_WITHOUT_RULE = ["model", "dataset", "placement", "batch_size", "eps"]

_STANDARD_RULE, *_CONTROL_RULES = RULES.values()


def _flat(of_rule: pd.DataFrame) -> tuple[Verdict, pd.Series[Any], str]:
    """Judge whether the first descent is within FLAT_BAND of the highest rank's at all ranks.

    Returns:
        The verdict, the row of the rank that decides, and the numbers in words.
    """
    top = of_rule["rank"].max()
    others = of_rule[of_rule["rank"] < top]
    verdicts: list[Verdict] = [within(low, high, FLAT_BAND) for low, high in others[["low", "high"]].to_numpy(float)]
    verdict = all_of(verdicts)
    deciding = others[[of_rank == verdict for of_rank in verdicts]]
    furthest = deciding.sort_values("ratio", key=lambda ratio: (ratio - 1).abs()).iloc[-1]
    ratios = ", ".join(
        f"r{row['rank']} {row['ratio']:.3f} {fixed_interval(row['low'], row['high'], 3)}"
        for _, row in others.iterrows()
    )
    return verdict, furthest, f"first descent over that of r{top}: {ratios}, {furthest['n_seeds']} seeds"


def _by_rule(ratios: pd.DataFrame) -> Finding:
    by_rule = {rule: of_rule for rule, of_rule in ratios.groupby("rule") if len(of_rule) > 1}
    verdict, furthest, text = _flat(by_rule[_STANDARD_RULE])
    problems = []
    if furthest["n_seeds"] < MIN_SEEDS:
        problems.append(f"{furthest['n_seeds']} paired seeds, {MIN_SEEDS} needed")
    for rule in _CONTROL_RULES:
        if rule not in by_rule:
            continue
        control, _, ratios_text = _flat(by_rule[rule])
        text += f"; control {rule}: {ratios_text}"
        if verdict == "confirmed" and control != "contradicted":
            problems.append(f"the control {rule} does not fail, so the measure can't tell rules apart")
    if verdict == "confirmed" and not by_rule.keys() & set(_CONTROL_RULES):
        problems.append("no control with another rule")
    run_ids = [run_id for of_rule in by_rule.values() for ids in of_rule["run_ids"] for run_id in ids]
    interval = (float(furthest["low"]), float(furthest["high"]))
    ratio = float(furthest["ratio"])
    return finding(run_ids, text, verdict, problems, ratio, interval, abs(ratio - 1))


def first_update_rank_independent(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C4: judge the descent of the first update by rank, with 1/r and with the rules that must fail."""
    ratios = descent_ratios(first_descents(lora, curves))
    if ratios.empty:
        raise UnjudgedError("not tested", "no descent at step 1")
    groups = [of_batches for _, of_batches in ratios.groupby(_WITHOUT_RULE, dropna=False)]
    comparable = [group for group in groups if (group["rule"] == _STANDARD_RULE).sum() > 1]
    if not comparable:
        raise UnjudgedError("inconclusive", f"fewer than two ranks with alpha {STANDARD['alpha']:g}")
    return together([_by_rule(group) for group in comparable])


C4 = Claim(
    id="C4",
    kind="theory",
    statement="The factor 1/r makes the expected first update independent of rank",
    figure="text",
    criterion=(
        "The measure is the first-order fall of the loss by the first update: the projection of the change of W on "
        "FullFT's gradient in nats, as a mean over seeds, over that of the highest rank. At every rank the 95% "
        f"interval of this ratio, paired by seed, lies within {FLAT_BAND[0]:g} to {FLAT_BAND[1]:g}. Ranks whose alpha "
        "grows as sqrt(r) or as r are the control, and must fail this"
    ),
    needs=(
        f"LoRA of several ranks with alpha {STANDARD['alpha']:g}, and with alpha growing with rank; {MIN_SEEDS} seeds"
    ),
    paper_value="equal; derived",
    unit="ratio",
    experiments=("parametrization",),
    judge=on_lora(first_update_rank_independent),
)


def _is_standard(arm: dict[str, Any]) -> bool:
    return all(arm[name] is None or arm[name] == value for name, value in STANDARD.items())


def _best_variant(runs: pd.DataFrame, standard: dict[str, Any], variants: list[dict[str, Any]]) -> Finding:
    """Judge every variant of one setting by itself; the worst finding decides."""
    noise = seed_noise(runs)
    row = rows_of(noise, standard, ["model", "dataset", "batch_size", "steps"]).iloc[0]
    sigma, dof = sigma_of(noise, standard, "test"), int(row["dof"])
    losses = {arm_label(loss): loss for _, loss in best_losses(runs).iterrows()}
    common = noise_problems(sigma, dof)
    for name in ("alpha", "lr_ratio"):
        if all(arm[name] is None or arm[name] == STANDARD[name] for arm in variants):
            common.append(f"no variant of {name}")
    findings = []
    for variant in variants:
        difference = gap(runs, variant, standard)
        interval = (difference.ci_low, difference.ci_high)
        problems = [
            f"{label}: " + ("best LR at the edge of its grid" if losses[label]["at_edge"] else "no run finished")
            for label in (arm_label(variant), arm_label(standard))
            if losses[label]["at_edge"] or math.isnan(losses[label]["lr_best"])
        ]
        if difference.n_seeds < MIN_SEEDS:
            problems.append(f"{difference.n_seeds} paired seeds, {MIN_SEEDS} needed")
        if difference.n_diverged:
            problems.append(f"{difference.n_diverged} repeats at the best LR diverged")
        text = (
            f"{arm_label(variant)} - standard = {nats(difference.estimate, *interval)} over {difference.n_seeds} seeds"
        )
        verdict = within(*interval, (-SIGMAS * sigma, math.inf))
        problems += equality_problems(verdict, sigma, float(losses[arm_label(standard)]["loss_mean"]))
        run_ids = rows_of(runs, variant)["run_id"]
        findings.append(finding(run_ids, text, verdict, problems, difference.estimate, interval, -difference.estimate))
    decided = together(findings)
    text = f"{decided.reason}; {sigma_text(sigma)}"
    return finding(
        [*decided.run_ids, *rows_of(runs, standard)["run_id"]],
        text,
        decided.verdict,
        common,
        decided.estimate,
        (decided.ci_low, decided.ci_high),
        decided.strain,
    )


def standard_near_optimal(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C9: judge the test NLL of each LR-tuned variant minus that of the standard parametrization."""
    runs = with_lr_grid(lora)
    findings = []
    for _, of_setting in runs.groupby(PAIR_SETTING, dropna=False):
        arms = [arm for arm, _ in each_arm(of_setting)]
        standard = next((arm for arm in arms if _is_standard(arm)), None)
        variants = [arm for arm in arms if not _is_standard(arm)]
        if standard and variants:
            findings.append(_best_variant(of_setting, standard, variants))
    if not findings:
        raise UnjudgedError(
            "not tested", "no LR-tuned variants of alpha or LR ratio beside the standard parametrization"
        )
    return together(findings)


C9 = Claim(
    id="C9",
    kind="opinion",
    statement=f"No other alpha or LR ratio of B and A is better than alpha {STANDARD['alpha']:g} with equal LRs",
    figure="text",
    criterion=(
        "The test NLL of each variant of alpha and of LR_B/LR_A minus that of the standard parametrization, each at "
        f"its own best LR and paired by seed, has no 95% interval that reaches below -{SIGMAS} sigma. Contradicted if "
        "an interval lies wholly below that"
    ),
    needs=f"the standard parametrization and variants of alpha and LR ratio, each LR-tuned; {MIN_SEEDS} seeds",
    paper_value="unable to improve; no number",
    unit="nats per token",
    experiments=("parametrization",),
    judge=on_lora(standard_near_optimal),
)


def most_examples(comparisons: list[Comparison]) -> list[Scoped]:
    """Choose, for each model, the comparisons with the most examples seen, random facts left out."""
    sized: dict[str, list[tuple[float, Comparison]]] = {}
    for comparison in comparisons:
        first = comparison.runs.iloc[0]
        if comparison.lora and pd.isna(first.get("entropy_bits")):
            seen = first["steps"] * first["batch_size"]
            sized.setdefault(first["model"], []).append((0.0 if pd.isna(seen) else float(seen), comparison))
    return [
        (comparison, f" (longest runs, {comparison.runs['steps'].iloc[0]} steps)")
        for of_model in sized.values()
        for seen, comparison in of_model
        if seen == max(size for size, _ in of_model)
    ]


def b_outgrows_a(comparison: Comparison) -> Finding:
    """C10: judge the share of layers in which B has the larger spectral norm, at the end and best LR of each rank."""
    arms = list(comparison.lora.values())
    if not arms:
        raise UnjudgedError("not tested", "no LoRA on all layers")
    last = train_curves(comparison.runs, comparison.curves, "b_over_a").groupby("run_id").last()
    last = last[last["step"] == last["steps"].fillna(last["step"])]
    shares = last["value"].astype(float)
    findings = []
    for arm in arms:
        run_ids = [run_id for run_id in comparison.losses[arm_label(arm)]["run_ids"] if run_id in shares]
        if not run_ids:
            continue
        share, low, high = mean_interval(shares.loc[run_ids])
        verdict: Verdict = "confirmed" if low > HALF else "contradicted" if high <= HALF else "inconclusive"
        text = f"{arm_label(arm)} {share:.2f} {fixed_interval(low, high, 2)} over {len(run_ids)} seeds"
        findings.append(finding(run_ids, text, verdict, comparison.edge_problems([arm]), share, (low, high), -share))
    if not findings:
        raise UnjudgedError("not tested", "no b_over_a at the last step of a run at its best LR")
    decided = together(findings)
    return replace(decided, reason=f"share of layers with ||B|| > ||A||: {decided.reason}")


C10 = Claim(
    id="C10",
    kind="empirical",
    statement="At the end of full runs, B has a larger spectral norm than A",
    figure="text",
    criterion=(
        "In the longest SFT runs of each model (most examples seen, random facts left out) at each rank's best LR, B "
        "has the larger spectral norm in more than half of the layers after the last step: the 95% interval of this "
        "share over seeds is above 0.5 at every rank. Contradicted if it is below 0.5 at some rank"
    ),
    needs="LoRA on all layers with an LR grid; b_over_a at the last step; seeds at the best LR",
    paper_value="larger; no number",
    unit="share of layers",
    experiments=("rank", "short_run", "capacity"),
    judge=over(most_examples, b_outgrows_a),
)

ADAM_STEPS = 10
"""The number of steps that Adam's first moment, with its decay of 0.9, takes to fill."""


def _growth_by_a(of_pair: pd.DataFrame) -> Finding:
    """Judge one LR and rank against its control, over seeds."""
    first = of_pair.iloc[0]
    mean, low, high = mean_interval(np.log(of_pair["growth"]))
    ratio, interval = math.exp(mean), (math.exp(low), math.exp(high))
    text = (
        f"r{first['rank']} LR {first['lr_fast']:g}: change of W at step {first['step']} over the first is {ratio:.2f} "
        f"{fixed_interval(*interval, 2)} times that with LR_A {first['lr_slow']:g} and the same LR_B, {len(of_pair)} "
        "seeds"
    )
    problems = [f"{len(of_pair)} paired seeds, {MIN_SEEDS} needed"] if len(of_pair) < MIN_SEEDS else []
    verdict: Verdict = "confirmed" if low > 0 else "contradicted" if high < 0 else "inconclusive"
    run_ids = [*of_pair["run_id_fast"], *of_pair["run_id_slow"]]
    return finding(run_ids, text, verdict, problems, ratio, interval, -ratio)


def _growth(label: str, sizes: dict[Any, pd.Series[Any]]) -> Finding:
    """Judge one rank at its best LR without a control, from the size of each step by run."""
    last = max(sizes[next(iter(sizes))].index)
    # On a log axis these are the later half of the steps.
    growth = pd.Series(
        {run_id: float(np.log(size[size.index >= math.sqrt(last)] / size[1]).mean()) for run_id, size in sizes.items()}
    )
    mean, low, high = mean_interval(growth)
    ratio, interval = math.exp(mean), (math.exp(low), math.exp(high))
    filled = {run_id: size[size.index >= ADAM_STEPS] for run_id, size in sizes.items()}
    slope, slope_low, slope_high = mean_interval(
        pd.Series([log_log(size.index, size).slope for size in filled.values()], dtype=float)
    )
    text = (
        f"{label}: change of W per step over the LR is {ratio:.2f} {fixed_interval(*interval, 2)} times that "
        f"of the first step from step {math.ceil(math.sqrt(last))} to {last}, {len(sizes)} seeds"
    )
    # A slope needs two recorded steps.
    if not math.isnan(slope):
        text += f"; it goes as step to the power {slope:.2f} {fixed_interval(slope_low, slope_high, 2)} from "
        text += f"step {ADAM_STEPS} on"
    problems = [f"{len(sizes)} seeds, {MIN_SEEDS} needed"] if len(sizes) < MIN_SEEDS else []
    verdict: Verdict = "inconclusive"
    if interval[0] > 1:
        verdict = "confirmed"
    elif interval[1] < 1 and slope_high < 0:
        verdict = "contradicted"
    return finding(sizes, text, verdict, problems, ratio, interval, -ratio)


def _growth_by_itself(lora: pd.DataFrame, curves: pd.DataFrame) -> list[Finding]:
    """Judge each rank at its best LR without a control, over the first half of its run."""
    sizes = step_sizes(lora, curves)
    early = sizes[(sizes["step"] <= sizes["steps"].fillna(sizes["step"].max()) / 2)]
    findings = []
    for arm, of_arm in each_arm(early):
        by_run = {run_id: rows.set_index("step")["size"] for run_id, rows in of_arm.groupby("run_id")}
        by_run = {run_id: size for run_id, size in by_run.items() if 1 in size.index and len(size) > 1}
        if by_run:
            findings.append(_growth(arm_label(arm), by_run))
    return findings


def effective_lr_grows(lora: pd.DataFrame, curves: pd.DataFrame) -> Finding:
    """C11: judge the change of W by one step against runs in which A is still, or else against the first step."""
    by_itself = _growth_by_itself(lora, curves)
    growth = update_growth(fixed_a_controls(lora), curves)
    names = [f"{name}_{speed}" for name in CONFIGURATION for speed in ("fast", "slow")]
    controlled = [_growth_by_a(of_pair) for _, of_pair in growth.groupby([*PAIR_SETTING, *names], dropna=False)]
    if not controlled and not by_itself:
        raise UnjudgedError("not tested", "no update_norm of the standard parametrization at step 1 and later")
    decided = together(controlled or by_itself)
    if not controlled or not by_itself:
        return decided
    uncorrected = together(by_itself)
    run_ids = tuple(sorted({*decided.run_ids, *uncorrected.run_ids}))
    return replace(decided, reason=f"{decided.reason}; for comparison {uncorrected.reason}", run_ids=run_ids)


C11 = Claim(
    id="C11",
    kind="theory",
    statement="LoRA's effective LR grows during training, since A's updates do nothing while B is 0",
    figure="text",
    criterion=(
        "With a control: at the last recorded step, the norm of the change of W by one step, relative to the first "
        "step, over the same ratio of a run with a tenth of LR_A and the same LR_B, has a 95% interval over paired "
        "seeds above 1; contradicted if it is below. In the control A hardly moves, and Adam's updates shrink as much. "
        "Without a control: the norm of the change of W over the LR, in the first half of the longest runs at the "
        "best LR (mean of logs over the recorded steps from the square root of its last step on), over that of the "
        f"first step is above 1; contradicted only if it is below 1 and falls from step {ADAM_STEPS} on, since Adam's "
        "first update is its largest"
    ),
    needs=f"LoRA with update_norm at the first step and later, and with LR_A a tenth; {MIN_SEEDS} seeds of both",
    paper_value="grows; derived",
    unit="ratio",
    experiments=("parametrization",),
    judge=on_lora(effective_lr_grows),
)

CLAIMS = (C4, C9, C10, C11)
