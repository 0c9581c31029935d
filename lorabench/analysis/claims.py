"""The paper's claims, each with a criterion and a function that judges it from the tidy tables.

A new claim is one entry of `CLAIMS` and one small function `judge(comparison) -> Finding`. Verdicts:

    confirmed      the criterion holds, with its whole interval, on every comparison that the claim is about
    contradicted   on some comparison it fails, with its whole interval
    inconclusive   neither: too noisy, too few seeds, an arm missing, an optimum at the edge of its grid
    not tested     the tables hold nothing that the claim is about

Criteria and the paper's numbers are those of the project's notes on the paper (claims table); what the paper leaves
open is decided here and said in `criterion`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from lorabench.analysis.arms import ARM, arm_label, check_table, each_arm
from lorabench.analysis.departure import departures
from lorabench.analysis.envelopes import envelopes
from lorabench.analysis.gaps import best_losses, gap
from lorabench.analysis.noise import seed_noise
from lorabench.analysis.optimum import lr_draws, lr_optima
from lorabench.tables import CLAIMS as COLUMNS

Verdict = Literal["confirmed", "contradicted", "inconclusive", "not tested"]
Arm = dict[str, Any]

MIN_SEEDS = 3
"""Seeds that a verdict on a difference needs (science rule 5)."""

MAX_NOISE = 0.05
"""Two sigma above this share of the loss is too noisy to call two losses equal: the margin would grow with sigma."""

_NEEDED = ["run_id", *ARM, "lr", "seed", "status", "final_valid_nll", "final_test_nll"]


@dataclass(frozen=True)
class Finding:
    """What one comparison, or all together, say about a claim."""

    verdict: Verdict
    reason: str
    estimate: float = math.nan
    ci_low: float = math.nan
    ci_high: float = math.nan
    strain: float = -math.inf
    """How near to failing, the larger the nearer: which of several findings with the same verdict to show."""
    run_ids: tuple[str, ...] = ()


class UnjudgedError(Exception):
    """A claim can't be judged; carries the verdict that says so."""

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.finding = Finding(verdict, reason)


@dataclass(frozen=True)
class Comparison:
    """The arms that can be compared: FullFT and LoRA on all layers, of one model, dataset and batch size."""

    label: str
    runs: pd.DataFrame
    curves: pd.DataFrame
    noise: pd.DataFrame

    @cached_property
    def arms(self) -> list[Arm]:
        return [arm for arm, _ in each_arm(self.runs)]

    @cached_property
    def rows(self) -> dict[str, pd.DataFrame]:
        """Runs, by arm label."""
        return {arm_label(arm): rows for arm, rows in each_arm(self.runs)}

    @property
    def fullft(self) -> Arm | None:
        return next((arm for arm in self.arms if arm["method"] == "fullft"), None)

    @cached_property
    def lora(self) -> dict[int, Arm]:
        """LoRA arms by rank, ascending."""
        return {arm["rank"]: arm for arm in self.arms if arm["method"] == "lora"}

    @property
    def highest(self) -> Arm | None:
        """The highest LoRA rank present, which stands for the paper's high ranks; rank 1 never does."""
        return next((arm for rank, arm in reversed(self.lora.items()) if rank > 1), None)

    def sigma(self, split: str) -> tuple[float, int]:
        """Seed noise in nats and its degrees of freedom."""
        column = "sigma_valid" if split == "validation" else "sigma"
        return float(self.noise[column].iloc[0]), int(self.noise["dof"].iloc[0])

    @cached_property
    def losses(self) -> dict[str, pd.Series]:
        """Rows of `best_losses`, by arm label."""
        return {arm_label(row): row for _, row in best_losses(self.runs).iterrows()}

    @cached_property
    def optima(self) -> dict[str, pd.Series]:
        """Rows of `lr_optima`, by arm label."""
        return {arm_label(row): row for _, row in lr_optima(self.runs, self.noise).iterrows()}

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """Bootstrap draws of optimal LRs, by arm label."""
        return {label: lr_draws(rows, self.noise) for label, rows in self.rows.items()}

    def of(self, arms: Iterable[Arm]) -> pd.DataFrame:
        """The runs of some arms."""
        return pd.concat([self.rows[arm_label(arm)] for arm in arms])


Scoped = tuple[Comparison, str]
"""A comparison that a claim is about, and why that one."""


def every_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """All that the tables hold."""
    return [(comparison, "") for comparison in comparisons]


def smallest_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model, the dataset with the fewest train tokens."""
    return _by_size(comparisons, "train_tokens", lambda runs: float(runs["train_tokens"].max()), -1, "fewest tokens")


def longest_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model, the dataset with the most examples seen (steps times batch size)."""
    return _by_size(
        comparisons, "steps", lambda runs: float((runs["steps"] * runs["batch_size"]).max()), 1, "most examples"
    )


def _by_size(
    comparisons: list[Comparison], column: str, size: Callable[[pd.DataFrame], float], sign: int, why: str
) -> list[Scoped]:
    by_model: dict[str, dict[str, list[Comparison]]] = {}
    for comparison in comparisons:
        first = comparison.runs.iloc[0]
        by_model.setdefault(first["model"], {}).setdefault(first["dataset"], []).append(comparison)
    chosen: list[Scoped] = []
    for model, datasets in by_model.items():
        if len(datasets) == 1:
            [picked] = datasets.values()
            note = f" (the only dataset of {model})"
        elif any(column not in c.runs or c.runs[column].isna().all() for group in datasets.values() for c in group):
            raise UnjudgedError("not tested", f"the runs table has no {column}, by which {model}'s dataset is chosen")
        else:
            sizes = {dataset: sign * max(size(c.runs) for c in group) for dataset, group in datasets.items()}
            picked = datasets[max(sizes, key=lambda dataset: sizes[dataset])]
            note = f" ({why} of {len(datasets)} datasets)"
        chosen += [(comparison, note) for comparison in picked]
    return chosen


@dataclass(frozen=True)
class Claim:
    """A testable statement of the paper."""

    id: str
    statement: str
    figure: str
    criterion: str
    needs: str
    paper_value: str
    unit: str
    experiments: tuple[str, ...]
    """Experiments whose runs it reads; in a table without the column `experiments`, all runs."""
    judge: Callable[[Comparison], Finding]
    scope: Callable[[list[Comparison]], list[Scoped]] = every_dataset
    """Which comparisons it is about."""


def judge_claims(runs: pd.DataFrame, curves: pd.DataFrame, claims: Sequence[Claim] | None = None) -> pd.DataFrame:
    """Judge the claims.

    Args:
        runs: the table `runs`; columns beyond run_id, ARM, lr, seed, status, final_valid_nll and final_test_nll are
            used where a claim needs them.
        curves: the table `curves`.
        claims: those to judge; all of `CLAIMS`, unless given.

    Returns:
        The table `claims` (columns of `lorabench.tables.CLAIMS`), one row per claim. Where a claim is judged on
        several models and datasets, the estimate is that of the one that decides, and the reason names each.

    Raises:
        UserError: a run_id appears twice; a model and dataset have several tokenizers or chat templates; an arm has
            two runs of the same LR and seed.
    """
    unreadable = _unreadable(runs)
    if not unreadable:
        check_table(runs)
    claims = CLAIMS if claims is None else claims
    experiments = {claim.experiments for claim in claims}
    comparisons = {names: [] if unreadable else _comparisons(names, runs, curves) for names in experiments}
    rows = []
    for claim in claims:
        of_claim = comparisons[claim.experiments]
        absent = unreadable or f"no such runs in the experiment {' or '.join(claim.experiments)}"
        found = _judge(claim, of_claim) if of_claim else Finding("not tested", absent)
        rows.append(
            {
                "claim_id": claim.id,
                "statement": claim.statement,
                "figure": claim.figure,
                "criterion": claim.criterion,
                "estimate": found.estimate,
                "ci_low": found.ci_low,
                "ci_high": found.ci_high,
                "unit": claim.unit,
                "n_runs": len(found.run_ids),
                "verdict": found.verdict,
                "reason": found.reason,
                "paper_value": claim.paper_value,
                "run_ids": list(found.run_ids),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS.names)


def _judge(claim: Claim, comparisons: list[Comparison]) -> Finding:
    """One finding from those on each comparison that the claim is about."""
    try:
        scoped = claim.scope(comparisons)
    except UnjudgedError as unjudged:
        return unjudged.finding
    found = []
    for comparison, note in scoped:
        try:
            finding = claim.judge(comparison)
        except UnjudgedError as unjudged:
            finding = unjudged.finding
        found.append(replace(finding, reason=f"{comparison.label}{note}: {finding.reason}"))
    decisive = worst(found)
    reasons = [decisive.reason, *(finding.reason for finding in found if finding is not decisive)]
    run_ids = tuple(sorted({run_id for finding in found for run_id in finding.run_ids}))
    return replace(decisive, reason="; ".join(reasons), run_ids=run_ids)


def worst(findings: list[Finding]) -> Finding:
    """The finding that decides over several: contradicted before inconclusive before confirmed, then by strain.

    `not tested` counts only if all are.
    """
    order = ["not tested", "confirmed", "inconclusive", "contradicted"]
    return max(findings, key=lambda finding: (order.index(finding.verdict), finding.strain))


def _unreadable(runs: pd.DataFrame) -> str:
    """Why nothing can be judged from that table; empty if something can."""
    if runs.empty:
        return "the runs table is empty"
    missing = [name for name in _NEEDED if name not in runs]
    return f"the runs table has no column {', '.join(missing)}" if missing else ""


def _comparisons(experiments: tuple[str, ...], runs: pd.DataFrame, curves: pd.DataFrame) -> list[Comparison]:
    """What the tables hold of some experiments, ready to be compared."""
    placed = (runs["method"] == "fullft") | runs["placement"].isna() | (runs["placement"] == "all")
    chosen = runs[placed.astype(bool) & _in_experiments(runs, experiments)]
    noise = seed_noise(chosen)
    found = []
    several_batch_sizes = chosen.groupby(["model", "dataset"])["batch_size"].transform("nunique").max() > 1
    for (model, dataset, batch_size), of_group in chosen.groupby(["model", "dataset", "batch_size"], dropna=False):
        label = f"{model}/{dataset}" + (f" batch {batch_size}" if several_batch_sizes else "")
        of_pair = noise[(noise["model"] == model) & (noise["dataset"] == dataset)]
        found.append(Comparison(label, of_group, curves, of_pair))
    return found


def _in_experiments(runs: pd.DataFrame, names: tuple[str, ...]) -> pd.Series:
    """Which runs belong to one of the experiments; a run that says nothing belongs to all."""
    if "experiments" not in runs:
        return pd.Series(True, index=runs.index)
    listed = runs["experiments"].map(lambda value: value.split() if isinstance(value, str) else value)
    return listed.map(lambda value: not isinstance(value, Iterable) or any(name in value for name in names)).astype(
        bool
    )


def _require(*arms: tuple[str, Arm | None]) -> list[Arm]:
    """The arms that a claim compares, given with what they are called; stops where they are not there."""
    missing = [name for name, arm in arms if arm is None]
    if missing:
        verdict: Verdict = "not tested" if len(missing) == len(arms) else "inconclusive"
        raise UnjudgedError(verdict, f"no runs of {' and '.join(missing)}")
    return [arm for _, arm in arms if arm is not None]


def _finding(
    comparison: Comparison,
    arms: list[Arm],
    text: str,
    verdict: Verdict,
    problems: list[str],
    estimate: float,
    interval: tuple[float, float] = (math.nan, math.nan),
    strain: float = -math.inf,
) -> Finding:
    """A finding with its numbers in words; with any problem it is inconclusive, and says why."""
    return Finding(
        verdict="inconclusive" if problems else verdict,
        reason=f"{text}; {', '.join(problems)}" if problems else text,
        estimate=estimate,
        ci_low=interval[0],
        ci_high=interval[1],
        strain=-math.inf if math.isnan(strain) else strain,
        run_ids=tuple(comparison.of(arms)["run_id"]),
    )


def _noise_problems(sigma: float, dof: int, loss: float | None = None) -> list[str]:
    """Why the seed noise does not carry a verdict; `loss` is given where sigma widens a margin."""
    if not sigma > 0 or dof < MIN_SEEDS - 1:
        return ["seed noise not measured"]
    if loss is not None and 2 * sigma > MAX_NOISE * loss:
        return [f"2 sigma is more than {MAX_NOISE:.0%} of the loss"]
    return []


def _edge_problems(comparison: Comparison, arms: list[Arm]) -> list[str]:
    losses = [comparison.losses[arm_label(arm)] for arm in arms]
    return [
        f"{arm_label(found)}: " + ("best LR at the edge of its grid" if found["at_edge"] else "no run finished")
        for found in losses
        if found["at_edge"] or math.isnan(found["lr_best"])
    ]


def within(low: float, high: float, band: tuple[float, float]) -> Verdict:
    """Confirmed if the interval lies inside the band, contradicted if wholly outside. NaN is inconclusive."""
    if band[0] <= low and high <= band[1]:
        return "confirmed"
    return "contradicted" if high < band[0] or low > band[1] else "inconclusive"


def same_curve(comparison: Comparison) -> Finding:
    """A1: envelopes of the highest rank and FullFT, at the step where they are furthest apart for their margin."""
    lora, fullft = _require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    points = envelopes(comparison.of([lora, fullft]), comparison.curves)
    points = points[points["step"] > 0.01 * points["step"].max()]
    both = points[points["method"] == "lora"].merge(points[points["method"] == "fullft"], on="step")
    if both.empty:
        raise UnjudgedError("not tested", "no validation curves with steps in common")
    sigma, dof = comparison.sigma("validation")
    # Two single runs; that they share their data order makes this cautious.
    half = float(stats.t.ppf(0.975, dof)) * math.sqrt(2) * sigma if dof else math.nan
    both = both.assign(gap=both["value_x"] - both["value_y"], margin=np.fmax(2 * sigma, 0.01 * both["value_y"]))
    both = both.assign(strain=(both["gap"].abs() + np.nan_to_num(half)) / both["margin"])
    furthest = both.loc[both["strain"].idxmax()]
    difference, margin = float(furthest["gap"]), float(furthest["margin"])
    interval = (difference - half, difference + half)
    text = (
        f"{arm_label(lora)} - FullFT at most {_nats(difference, *interval)} (step {furthest['step']} of "
        f"{len(both)} points), margin {margin:.4f}, {_sigma(sigma)}"
    )
    problems = _noise_problems(sigma, dof, furthest["value_y"]) + _edge_problems(comparison, [lora, fullft])
    verdict = within(*interval, (-margin, margin))
    return _finding(comparison, [lora, fullft], text, verdict, problems, difference, interval, furthest["strain"])


def departure_grows_with_rank(comparison: Comparison) -> Finding:
    """A3: rank correlation of rank and departure step; a rank that never leaves counts as leaving last."""
    fullft, _ = _require(("FullFT", comparison.fullft), ("LoRA", next(iter(comparison.lora.values()), None)))
    ranks, arms = list(comparison.lora), [*comparison.lora.values(), fullft]
    points = envelopes(comparison.of(arms), comparison.curves)
    if points.empty:
        raise UnjudgedError("not tested", "no validation curves")
    left = departures(points, comparison.noise)
    lora = left[left["method"] == "lora"].set_index("rank").reindex(ranks)
    steps = lora["step"].to_numpy(float, na_value=math.inf)
    gone = np.isfinite(steps)
    rho = float(stats.spearmanr(ranks, steps).statistic) if len(ranks) > 1 and len(set(steps)) > 1 else math.nan
    told = ", ".join(
        f"r{rank} {f'at step {step:.0f}' if math.isfinite(step) else 'never'}"
        for rank, step in zip(ranks, steps, strict=True)
    )
    correlation = "no rank correlation" if math.isnan(rho) else f"Spearman rho {rho:.2f}"
    sigma, dof = comparison.sigma("validation")
    text = f"leaves the shared curve: {told}; {correlation}, {_sigma(sigma)}"
    problems = _noise_problems(sigma, dof) + _edge_problems(comparison, arms)
    if len(left) < len(arms) or left["departed"].isna().any():
        problems.append("too few points on some curve")
    if ranks[0] != 1 or len(ranks) < 3:
        problems.append("needs rank 1 and at least three ranks")
    elif not gone.any():
        problems.append("no rank leaves, so this data is within the capacity of all")
    verdict: Verdict = "inconclusive"
    if rho < 0 or (gone.any() and not gone[0]):
        verdict = "contradicted"
    elif gone[-1]:
        text += "; the highest rank leaves too"
    elif gone.sum() < 2:
        text += "; fewer than two ranks leave"
    elif rho >= 0.9 or (steps[1:] >= steps[:-1]).all():
        verdict = "confirmed"
    return _finding(comparison, arms, text, verdict, problems, rho, strain=-rho)


def same_final_loss(comparison: Comparison) -> Finding:
    """A7, B2: final test NLL of the highest rank and FullFT, each at its best LR."""
    arms = _require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    estimate, interval, text, problems = _final_gap(comparison, arms[0], arms[1])
    sigma, dof = comparison.sigma("test")
    loss = float(comparison.losses[arm_label(arms[1])]["nll_mean"])
    margin = float(np.fmax(2 * sigma, 0.005 * loss))
    problems += _noise_problems(sigma, dof, loss)
    verdict, text = within(*interval, (-margin, margin)), f"{text}, margin {margin:.4f}, {_sigma(sigma)}"
    return _finding(comparison, arms, text, verdict, problems, estimate, interval, abs(estimate) / margin)


def rank_1_worse(comparison: Comparison) -> Finding:
    """A8: final test NLL of rank 1 above that of FullFT, each at its best LR."""
    arms = _require(("LoRA r1", comparison.lora.get(1)), ("FullFT", comparison.fullft))
    estimate, interval, text, problems = _final_gap(comparison, arms[0], arms[1])
    sigma, dof = comparison.sigma("test")
    problems += _noise_problems(sigma, dof)
    verdict: Verdict = "inconclusive"
    if estimate > 2 * sigma and interval[0] > 0:
        verdict = "confirmed"
    elif interval[1] < 2 * sigma:
        verdict = "contradicted"
    return _finding(comparison, arms, f"{text}, {_sigma(sigma)}", verdict, problems, estimate, interval, -estimate)


def _final_gap(comparison: Comparison, arm: Arm, other: Arm) -> tuple[float, tuple[float, float], str, list[str]]:
    """Estimate, interval, their words, and what speaks against a verdict."""
    found = gap(comparison.runs, arm, other)
    problems = _edge_problems(comparison, [arm, other])
    if found.n_seeds < MIN_SEEDS:
        problems.append(f"{found.n_seeds} paired seeds, {MIN_SEEDS} needed")
    if found.n_diverged:
        problems.append(f"{found.n_diverged} repeats at the best LR diverged")
    interval = (found.ci_low, found.ci_high)
    text = f"{arm_label(arm)} - {arm_label(other)} = {_nats(found.estimate, *interval)} over {found.n_seeds} seeds"
    return found.estimate, interval, text, problems


def lr_ratio_ten(comparison: Comparison) -> Finding:
    """B1: optimal LR of the highest rank over that of FullFT."""
    arms = _require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))
    return _lr_ratio(comparison, arms[0], arms[1], band=(6.0, 16.0), expected=10.0)


def lr_independent_of_rank(comparison: Comparison) -> Finding:
    """B3: for every two ranks from 4 up, the larger optimal LR over the smaller.

    Judged by pairs, not by the bootstrap of the largest over the smallest, which noise alone drives up.
    """
    arms = [arm for rank, arm in comparison.lora.items() if rank >= 4]
    if len(arms) < 2:
        raise UnjudgedError("inconclusive" if arms else "not tested", "fewer than two LoRA ranks from 4 up")
    optima = {arm["rank"]: float(comparison.optima[arm_label(arm)]["lr_opt"]) for arm in arms}
    ordered = sorted(arms, key=lambda arm: -np.nan_to_num(optima[arm["rank"]]))
    pairs = [
        _lr_ratio(comparison, pair[0], pair[1], band=(0.5, 2.0), expected=1.0) for pair in combinations(ordered, 2)
    ]
    told = ", ".join(f"r{rank} {lr:.2g}" for rank, lr in optima.items())
    decisive = worst(pairs)
    return replace(
        decisive, reason=f"{decisive.reason} (optimal LRs: {told})", run_ids=tuple(comparison.of(arms)["run_id"])
    )


def rank_1_lower_lr(comparison: Comparison) -> Finding:
    """B4: optimal LR of rank 1 over that of each rank from 16 up, or of the highest."""
    rank_1, highest = _require(("LoRA r1", comparison.lora.get(1)), ("LoRA above rank 1", comparison.highest))
    others = [arm for rank, arm in comparison.lora.items() if rank >= 16] or [highest]
    pairs = [_lr_ratio(comparison, rank_1, arm, band=(0.0, 1.0), expected=1.0, signed=True) for arm in others]
    return replace(worst(pairs), run_ids=tuple(comparison.of([rank_1, *others])["run_id"]))


def _lr_ratio(
    comparison: Comparison,
    arm: Arm,
    other: Arm,
    band: tuple[float, float],
    expected: float,
    signed: bool = False,
) -> Finding:
    """Whether the ratio of two optimal LRs lies in a band; `signed` where only a larger ratio strains the claim."""
    arms = [arm, other]
    optima = [comparison.optima[arm_label(one)] for one in arms]
    draws = [comparison.draws[arm_label(one)] for one in arms]
    estimate = float(optima[0]["lr_opt"] / optima[1]["lr_opt"])
    low, high = (float(bound) for bound in np.quantile(draws[0] / draws[1], [0.025, 0.975]))
    problems = _noise_problems(*comparison.sigma("validation")) + _edge_problems(comparison, arms)
    problems += [
        f"{arm_label(found)}: optimum not resolved by its grid"
        for found in optima
        if not problems and not found["resolved"]
    ]
    text = (
        f"optimal LR {arm_label(arm)} / {arm_label(other)} = {estimate:.2f} {_interval(low, high, 2)} "
        f"({optima[0]['lr_opt']:.2g} / {optima[1]['lr_opt']:.2g})"
    )
    strain = math.log(estimate / expected) if estimate > 0 else math.nan
    verdict = within(low, high, band)
    return _finding(comparison, arms, text, verdict, problems, estimate, (low, high), strain if signed else abs(strain))


def _nats(estimate: float, low: float, high: float) -> str:
    return f"{estimate:.4f} nats {_interval(low, high, 4)}"


def _interval(low: float, high: float, digits: int) -> str:
    return "(no interval)" if math.isnan(low + high) else f"[{low:.{digits}f}, {high:.{digits}f}]"


def _sigma(sigma: float) -> str:
    return "sigma not measured" if math.isnan(sigma) else f"sigma {sigma:.4f}"


_SWEEP = "FullFT and LoRA on all layers, each with an LR grid whose best LR is not at its edge"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="A1",
        statement="High-rank LoRA and full fine-tuning have the same learning curve",
        figure="1",
        criterion=(
            "After the first 1% of steps the envelopes of the highest rank and FullFT differ by at most "
            "max(2 sigma, 1% of FullFT's loss), with the 95% interval of a difference of two runs"
        ),
        needs=f"{_SWEEP}; validation curves; seeds that give sigma",
        paper_value="similar; no number",
        unit="nats per token",
        experiments=("rank",),
        judge=same_curve,
    ),
    Claim(
        id="A3",
        statement="Low and medium ranks leave the shared learning curve at a step that grows with rank",
        figure="1",
        criterion=(
            "On the longest dataset, the step from which a rank stays more than 2 sigma above the lowest envelope to "
            "the end, at least 3 points: rank 1 has one, the highest rank has none, at least two ranks do, and steps "
            "do not fall with rank or Spearman rho >= 0.9. Contradicted if rho < 0 or a rank leaves while rank 1 stays"
        ),
        needs=f"{_SWEEP}; rank 1 and two more ranks; validation curves; seeds that give sigma",
        paper_value="no number",
        unit="Spearman rho",
        experiments=("rank",),
        judge=departure_grows_with_rank,
        scope=longest_dataset,
    ),
    Claim(
        id="A7",
        statement="On a small dataset, LoRA and full fine-tuning reach the same final loss",
        figure="1, 2",
        criterion=(
            "On the dataset with the fewest train tokens, the 95% interval of the highest rank's test NLL minus "
            "FullFT's lies within max(2 sigma, 0.5% of the loss)"
        ),
        needs=f"{_SWEEP}; {MIN_SEEDS} seeds at the best LRs",
        paper_value="approximately the same; no number",
        unit="nats per token",
        experiments=("rank",),
        judge=same_final_loss,
        scope=smallest_dataset,
    ),
    Claim(
        id="A8",
        statement="On a dataset beyond its capacity, LoRA is worse than full fine-tuning",
        figure="1",
        criterion=(
            "On the longest dataset, rank 1's test NLL minus FullFT's is more than 2 sigma with its 95% interval "
            "above 0. Contradicted if the whole interval is below 2 sigma"
        ),
        needs=f"{_SWEEP}; rank 1; {MIN_SEEDS} seeds at the best LRs",
        paper_value="no number",
        unit="nats per token",
        experiments=("rank",),
        judge=rank_1_worse,
        scope=longest_dataset,
    ),
    Claim(
        id="B1",
        statement="The optimal LR of LoRA is 10 times that of full fine-tuning",
        figure="2",
        criterion="The 95% interval of the ratio, for the highest rank, lies within 6 to 16",
        needs=f"{_SWEEP}; seeds that give sigma",
        paper_value="10 (fit over 14 models: 9.8)",
        unit="ratio",
        experiments=("rank",),
        judge=lr_ratio_ten,
    ),
    Claim(
        id="B2",
        statement="At their optimal LRs, high-rank LoRA and full fine-tuning reach the same loss",
        figure="2",
        criterion=(
            "On every dataset, the 95% interval of the highest rank's test NLL minus FullFT's lies within "
            "max(2 sigma, 0.5% of the loss)"
        ),
        needs=f"{_SWEEP}; {MIN_SEEDS} seeds at the best LRs",
        paper_value="about the same; no number",
        unit="nats per token",
        experiments=("rank",),
        judge=same_final_loss,
    ),
    Claim(
        id="B3",
        statement="The optimal LR of LoRA is nearly the same at all ranks from 4 up",
        figure="2",
        criterion="For every two ranks from 4 up, the 95% interval of the ratio of optimal LRs lies within 1/2 to 2",
        needs="LoRA on all layers at two or more ranks from 4 up, each with an LR grid; seeds that give sigma",
        paper_value="less than 2 from rank 4 to 512",
        unit="ratio",
        experiments=("rank",),
        judge=lr_independent_of_rank,
    ),
    Claim(
        id="B4",
        statement="Rank 1 has a lower optimal LR than high ranks",
        figure="2",
        criterion=(
            "The 95% interval of rank 1's optimal LR over that of each rank from 16 up (or of the highest) is below "
            "1; the interval takes the place of a whole grid step"
        ),
        needs="LoRA on all layers at rank 1 and a higher one, each with an LR grid; seeds that give sigma",
        paper_value="lower; no number",
        unit="ratio",
        experiments=("rank",),
        judge=rank_1_lower_lr,
    ),
)
