"""The fit of losses against log LR finds known optima and minima, and its errors are those of repeated experiments."""

import math
import warnings
from itertools import product

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.loss_fit import Noise, fit_losses
from lorabench.analysis.optima import judge_ratio
from lorabench.analysis.rules import Above

CURVATURE = 0.06
LRS = {"FullFT": [1e-4, 2.5e-4, 6e-4, 1.5e-3, 4e-3], "LoRA r64": [5e-4, 1.2e-3, 3e-3, 7e-3, 1.7e-2]}
OPTIMA = {"FullFT": 7e-4, "LoRA r64": 2.2e-3, "LoRA r8": 2.6e-3}
MINIMA = {"FullFT": 0.25, "LoRA r64": 0.27, "LoRA r8": 0.29}


def row(label, lr, seed, loss, validation=None, status="done"):
    method, rank = ("fullft", None) if label == "FullFT" else ("lora", int(label.split("r")[1]))
    arm = {"model": "m", "dataset": "d", "batch_size": 8, "steps": 50, "method": method, "rank": rank}
    run = {"run_id": f"{label}/{lr:g}/{seed}", "lr": lr, "seed": seed, "status": status, "final_test_nll": loss}
    return arm | run | {"placement": rank and "all", "final_valid_nll": loss if validation is None else validation}


def loss_at(label, lr, curvature=CURVATURE):
    return MINIMA[label] + curvature * math.log(lr / OPTIMA[label]) ** 2


def world(random=None, seeds=3, arms=("FullFT", "LoRA r64"), curvatures=None, shared=0.02, own=0.004, run=0.003):
    """Return runs of arms, the first seed at every LR, the others at the best; without `random` there is no noise."""

    def noise(scale, number=seeds):
        return np.zeros(number) if random is None else random.normal(0, scale, number)

    rows, shared_luck = [], noise(shared)
    for label in arms:
        lrs, luck = LRS.get(label, LRS["LoRA r64"]), shared_luck + noise(own)
        curvature = (curvatures or {}).get(label, CURVATURE)
        losses = {lr: loss_at(label, lr, curvature) + luck[0] + noise(run, 1)[0] for lr in lrs}
        best = min(losses, key=losses.get)
        rows += [row(label, lr, 0, loss) for lr, loss in losses.items()]
        again = loss_at(label, best, curvature) + luck + noise(run)
        rows += [row(label, best, seed, again[seed]) for seed in range(1, seeds)]
    return pd.DataFrame(rows)


def test_without_noise_optima_minima_and_curvature_are_exact():
    fit = fit_losses(world())
    for label in LRS:
        assert math.exp(fit.optima[label].value) == pytest.approx(OPTIMA[label], rel=1e-6)
        assert fit.minima[label].value == pytest.approx(MINIMA[label], abs=1e-9)
        assert fit.curvature[label] == pytest.approx(CURVATURE)
    assert fit.gap("LoRA r64", "FullFT").value == pytest.approx(0.02)
    assert math.exp(fit.log_ratio("LoRA r64", "FullFT").value) == pytest.approx(2.2 / 0.7)
    # Arms have curvatures of their own.
    curvatures = {"FullFT": 0.03, "LoRA r64": 0.088}
    assert fit_losses(world(seeds=6, curvatures=curvatures)).curvature == pytest.approx(curvatures, rel=0.05)


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    """An asymmetry that arms share, over their curvature and about as it was measured, moves no minima and optima."""
    random, held = np.random.default_rng(3), []
    for number in range(60):
        runs = world(random, arms=("FullFT", "LoRA r64", "LoRA r8"), own=0.002, run=0.002)
        steps = np.log(runs["lr"] / runs["run_id"].str.split("/").str[0].map(OPTIMA))
        runs["final_test_nll"] += CURVATURE * random.normal(0.2, 0.1) * steps**3
        fit = fit_losses(runs, name=str(number))
        gap, ratio = (number("LoRA r64", "FullFT").interval() for number in (fit.gap, fit.log_ratio))
        held.append((gap[0] <= 0.02 <= gap[1], ratio[0] <= math.log(2.2 / 0.7) <= ratio[1]))
    # Two binomial standard errors below 95%.
    assert (np.mean(held, axis=0) >= 0.89).all()


def test_variances_are_those_of_statsmodels():
    import statsmodels.formula.api as smf

    random = np.random.default_rng(5)
    runs, shared = [], random.normal(0, 0.02, 8)
    for label in LRS:
        luck = shared + random.normal(0, 0.004, 8)
        for seed in range(8):
            for lr in OPTIMA[label] * np.array([0.5, 1, 2]):
                runs.append(row(label, lr, seed, loss_at(label, lr) + luck[seed] + random.normal(0, 0.002)))
    table = pd.DataFrame(runs)
    fit = fit_losses(table)
    data = table.assign(
        y=table["final_test_nll"],
        label=table["method"],
        x=np.log(table["lr"]) - table["method"].map({"fullft": math.log(7e-4), "lora": math.log(2.2e-3)}),
        cell=table["method"] + table["seed"].astype(str),
    )
    with warnings.catch_warnings(action="ignore"):  # statsmodels shows its warnings whatever the filters say
        mixed = smf.mixedlm("y ~ label + x:label + I(x**2):label + C(seed)", data, groups="cell").fit(reml=True)
    assert fit.sigma == pytest.approx(math.sqrt(mixed.scale + float(mixed.cov_re.iloc[0, 0])), rel=0.1)
    # With every LR at every seed, the gap of the minima is that of statsmodels, to what is known before the runs.
    minima = {
        method: mixed.params.get(f"label[T.{method}]", 0.0)
        - mixed.params[f"x:label[{method}]"] ** 2 / 4 / mixed.params[f"I(x ** 2):label[{method}]"]
        for method in ("fullft", "lora")
    }
    assert fit.gap("LoRA r64", "FullFT").value == pytest.approx(minima["lora"] - minima["fullft"], abs=5e-4)


def test_an_optimum_at_the_edge_is_flagged_with_the_lr_to_add():
    runs = world()
    lower = runs[~((runs["method"] == "fullft") & (runs["lr"] > 7e-4))]
    # A diverged run above bounds the optimum, but leaves it unresolved between the two.
    diverged = pd.DataFrame([row("FullFT", 1.5e-3, 0, math.nan, status="diverged")])
    fit, bounded = fit_losses(lower), fit_losses(pd.concat([lower, diverged]))
    assert not any(each.resolved["FullFT"] for each in (fit, bounded))
    assert (fit.grids["FullFT"].edge, bounded.grids["FullFT"].edge) == (pytest.approx(6e-4 * 2.5), None)
    assert bounded.grids["FullFT"].coarse == pytest.approx(math.sqrt(6e-4 * 1.5e-3))
    # A grid that is coarser than half a decade resolves nothing.
    cells = [(lr, seed) for lr in (7e-5, 7e-4, 7e-3) for seed in range(3)]
    coarse = pd.DataFrame([row("FullFT", lr, seed, loss_at("FullFT", lr)) for lr, seed in cells])
    assert not fit_losses(coarse).resolved.get("FullFT", False)


def test_an_arm_whose_best_lr_is_at_the_edge_bounds_gaps_and_ratios_from_one_side():
    runs = world(np.random.default_rng(5), seeds=6, own=0.002, run=0.002, arms=("FullFT", "LoRA r8"))
    # Full fine-tuning goes on to fall beyond its highest LR, so that LoRA's loss is at least as much above its lowest.
    (comparison,) = comparisons(runs[~((runs["method"] == "fullft") & (runs["lr"] > 6e-4))], pd.DataFrame())
    lora, fullft = comparison.lora[8], comparison.fullft
    for arms, side, verdict in (([lora, fullft], "below", "confirmed"), ([fullft, lora], "above", "contradicted")):
        (problem,) = comparison.problems(arms)
        assert (problem.bound, "edge" in problem.text) == (side, True)
        assert comparison.worse(*arms).verdict == verdict
        assert comparison.equal_losses(*arms).verdict == "contradicted"
        assert comparison.equal_losses(*arms, better_too=True).verdict == (
            "contradicted" if arms[0] == lora else "confirmed"
        )
    # Its optimal LR is at least that one, so LoRA's is at most so many times as high.
    (problem,) = comparison.problems([lora, fullft], resolved=True)
    assert problem.bound == "above"
    assert judge_ratio(comparison, lora, fullft, Above(math.log(100))).verdict == "contradicted"


@pytest.mark.parametrize(("optimum", "added"), [(8e-3, 1.5e-3**2 / 6e-4), (2.2e-3, None), (1.2e-3, None)])
def test_an_optimum_a_step_beyond_the_window_asks_for_an_lr_and_not_for_seeds(optimum, added):
    """Validation losses, which have their optimum at lower LRs, have centred the window there."""
    random, rows = np.random.default_rng(5), []
    best = {"FullFT": optimum, "LoRA r64": 2.2e-3}
    cells = [(label, lr, seed) for label in best for lr in LRS[label] for seed in range(3)]
    for label, lr, seed in cells:
        loss = 0.2 + CURVATURE * math.log(lr / best[label]) ** 2 + random.normal(0, 0.02)
        rows.append(row(label, lr, seed, loss, validation=5 * math.log(lr / OPTIMA[label]) ** 2))
    (comparison,) = comparisons(pd.DataFrame(rows), pd.DataFrame())
    problems = comparison.problems([comparison.fullft], resolved=True)
    if added is None:
        # It may lie beyond the LRs, which its interval says.
        low, high = comparison.fit.optima["FullFT"].interval()
        assert not problems
        assert low < math.log(optimum) < high
        assert high > math.log(1.5e-3)
    else:
        (problem,) = problems
        assert [other.text for other in comparison.problems([comparison.fullft])] == [problem.text]
        assert (problem.remedy.lrs, problem.remedy.seeds) == ((("FullFT", pytest.approx(added)),), None)


def test_one_arm_alone_has_the_errors_of_its_optimum_within_seeds_and_of_its_minimum_over_new_ones():
    random, held = np.random.default_rng(3), []
    for number in range(40):
        luck, optimum = random.normal(0, 0.02, 3), random.uniform(-0.4, 0.4)
        x = np.arange(-1, 2) - optimum
        losses = 2 + CURVATURE * (x**2 + random.normal(0.1, 0.1) * x**3) + random.normal(0, 0.004, (3, 3))
        fit, other = (
            fit_losses(
                pd.DataFrame(
                    row("FullFT", math.exp(step), seed, losses[seed, step + 1] + shared[seed])
                    for step, seed in product(range(-1, 2), range(3))
                ),
                name=str(number),
            )
            for shared in (luck, 10 * luck)
        )
        position, minimum = fit.optima["FullFT"].interval(), fit.minima["FullFT"].interval()
        resolved = fit.resolved["FullFT"]
        held.append((position[0] <= optimum <= position[1], minimum[0] <= 2 <= minimum[1], resolved))
        # Effects of seeds, however large, do not move the optimum.
        assert other.optima["FullFT"].interval() == pytest.approx(position)
    # Two binomial standard errors below 95%.
    assert (np.mean(held, axis=0) >= 0.88).all()


def test_one_seed_has_no_error_unless_its_noise_is_known_from_elsewhere():
    # The optima lie at LRs, so that the errors of the minima are not those of the shape of the loss.
    cells = [(label, OPTIMA[label] * 2.4**step) for label in LRS for step in (-1, 0, 1)]
    runs = pd.DataFrame([row(label, lr, 0, loss_at(label, lr)) for label, lr in cells])
    alone = fit_losses(runs)
    assert not any(number("LoRA r64", "FullFT").known for number in (alone.gap, alone.log_ratio))
    assert not any(alone.resolved.values())
    gap = fit_losses(runs, noise=Noise(0.01, 1000, "elsewhere")).gap("LoRA r64", "FullFT")
    # Two arms with a standard deviation of 0.01 each, whose curves average a little over LRs.
    assert 0.01 <= gap.seed_error <= 0.0155


def test_the_margin_of_one_seed_is_no_smaller_than_a_seeds_deviation():
    def margin(sigma, seeds):
        [comparison] = comparisons(world(seeds=seeds), pd.DataFrame(), Judging(noise=Noise(sigma, 1000, "elsewhere")))
        return comparison.margin.value

    # Without the loss of the base the margin is 1% of the lowest loss.
    assert margin(0.01, 1) == pytest.approx(0.01)
    assert [margin(0.001, 1), margin(0.01, 3)] == pytest.approx([0.0025] * 2, rel=0.01)


def test_the_margin_of_accuracies_is_two_points_where_there_is_a_gain():
    runs = world(np.random.default_rng(0))
    runs["final_reward"] = 1 - runs["final_test_nll"]
    for base, problems in ((0.5, 0), (0.9, 1)):
        [comparison] = comparisons(runs.assign(base_reward=base), pd.DataFrame())
        assert (comparison.margin.value, len(comparison.margin.problems)) == (0.02, problems)


def with_examples(runs, random, of_run, n):
    """Return the losses by test example of runs, whose mean losses they become, and the tokens of each example."""
    tokens = random.integers(5, 50, n).astype(float)
    nats = {run.run_id: (run.final_test_nll + of_run(run)) * tokens for run in runs.itertuples()}
    runs["final_test_nll"] = [nats[run_id].sum() / tokens.sum() for run_id in runs["run_id"]]
    return nats, dict.fromkeys(nats, tokens)


def test_the_error_from_test_examples_is_that_of_new_examples():
    random, runs, n = np.random.default_rng(8), world(), 400
    common, arm_part = random.normal(0, 0.2, n), random.normal(0, 0.1, n)
    nats, tokens = with_examples(runs, random, lambda run: common + arm_part * (run.method == "lora"), n)
    gap = fit_losses(runs, ExampleLosses(nats, tokens)).gap("LoRA r64", "FullFT")
    # What all arms share cancels; an arm's own part averages over examples, weighted by their tokens.
    weights = next(iter(tokens.values()))
    expected = 0.1 * math.sqrt((weights**2).sum()) / weights.sum()
    assert (gap.example_error, gap.n_examples) == (pytest.approx(expected, rel=0.15), n)
    assert fit_losses(runs).gap("LoRA r64", "FullFT").example_part is None


def test_few_groups_of_test_examples_are_named_and_one_group_leaves_the_verdict_open():
    random = np.random.default_rng(8)
    runs, group = world(random, arms=("FullFT", "LoRA r8")), np.repeat(np.arange(6), 10)
    runs["final_test_nll"] += 1.0
    arm_part, steepness = random.normal(0, 0.5, 6), random.normal(0, 0.05, 6)

    def of_run(run):
        by_group = (arm_part + steepness * math.log(run.lr / 2e-3)) * (run.method == "lora")
        return by_group[group] + random.normal(0, 0.02, 60)

    nats, tokens = with_examples(runs, random, of_run, 60)

    def compared(groups):
        judging = Judging(examples=ExampleLosses(nats, tokens, dict.fromkeys(nats, groups)))
        (comparison,) = comparisons(runs, pd.DataFrame(), judging)
        return comparison, comparison.gap(comparison.lora[8], comparison.fullft)

    _, singly = compared(np.arange(60))
    comparison, gap = compared(group)
    assert gap.example_error > 2 * singly.example_error
    assert (gap.n_examples, gap.n_groups, singly.n_groups) == (60, 6, 60)
    arms = [comparison.lora[8], comparison.fullft]
    assert comparison.gap_text(*arms).endswith("; the 60 test examples come from 6 groups")
    assert "groups of test examples (now 6)" in comparison.equal_losses(*arms).remedy.text
    comparison, gap = compared(np.zeros(60))
    (problem,) = comparison.problems(arms)
    assert (gap.known, gap.n_groups, "all of them are of one group" in problem.text) == (False, 1, True)
    assert comparison.equal_losses(*arms).verdict == "inconclusive"


def as_means(runs):
    """Return one row for each arm and LR: the mean of its seeds with their number and standard deviation."""
    by_cell = runs.groupby(["method", "lr"], sort=False)
    first = by_cell.head(1).set_index(["method", "lr"])
    means = by_cell[["final_valid_nll", "final_test_nll"]].mean()
    counted = {"n_seeds": by_cell["seed"].nunique(), "final_test_nll_sd": by_cell["final_test_nll"].std()}
    return first.assign(**means, **counted).reset_index()


def test_rows_that_are_means_of_seeds_count_as_that_many_with_their_own_noise():
    # Five seeds at every LR, whose losses differ by noise that is known. The minimum lies at an LR, where its error is
    # not that of the shape of the loss.
    offsets = [-0.012, -0.006, 0.0, 0.006, 0.012]
    cells = [(label, OPTIMA[label] * 2.4**step, seed) for label in LRS for step in range(-2, 3) for seed in range(5)]
    runs = pd.DataFrame([row(label, lr, seed, loss_at(label, lr) + offsets[seed]) for label, lr, seed in cells])
    fit = fit_losses(as_means(runs))
    gap = fit.gap("LoRA r64", "FullFT")
    assert gap.value == pytest.approx(0.02, abs=1e-9)
    assert fit.sigma == pytest.approx(np.std(offsets, ddof=1))
    # Three LRs of each arm lie in its window, each with four degrees of freedom.
    assert fit.dof == 6 * 4
    assert (gap.n_seeds, fit.noise_text) == (5, "; seed noise from the standard deviations in the table")
    # The same noise from elsewhere on single runs: the error is larger by the root of five.
    alone = fit_losses(runs[runs["seed"] == 2], noise=Noise(fit.sigma, fit.dof, "elsewhere"))
    assert alone.gap("LoRA r64", "FullFT").seed_error / gap.seed_error == pytest.approx(math.sqrt(5), rel=0.02)
