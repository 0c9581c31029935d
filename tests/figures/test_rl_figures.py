"""The figures of reinforcement learning, from tables made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.rewards import reward_curves, with_error_rates
from lorabench.figures.catalog import FIGURES
from lorabench.figures.grid import compared, optima
from lorabench.store.tables import Tables

from ..handmade import make_sweep, runs_table
from ..handmade.rl import AIME, BASE, OFFSETS, STEPS, arm, grown
from ..handmade.sft import tables
from .layout import draw as drawn
from .layout import lay_out, legend, lines, only, texts, titles

RL_FIGURES = [name for name, figure in FIGURES.items() if figure.task == "rl"]
SD = float(np.std(OFFSETS, ddof=1))


def read(arms) -> Tables:
    return Tables(*tables(arms))


def arms(ranks=(None, 1, 16), **settings):
    """Make FullFT with its optimum at 1e-4 and LoRA with its optimum at 1e-3; the lowest LR never gets a reward."""
    sweeps = []
    for rank in ranks:
        about = {"trainable_params": 828_288 if rank is None else 14_000 * rank, "max_new_tokens": 500}
        sweeps.append(arm(rank, optimum=1e-4 if rank is None else 1e-3, **(about | settings)))
    for runs, _ in sweeps:
        for run in runs:
            if run["lr"] == 1e-5 and run["status"] == "done":
                run |= {"status": "unrewarded"} | dict.fromkeys(("final_valid_reward", "final_reward"), BASE)
    return sweeps


def changed(arms, status, reward=None):
    """Make the same arms, but with all runs of one status and all rewards the same."""
    rewards = dict.fromkeys(("final_valid_reward", "final_reward", "best_reward"), reward)
    return [([run | rewards | {"status": status} for run in runs], curves) for runs, curves in arms]


def draw(name, arms):
    return drawn(name, read(arms))


def test_accuracies_are_means_over_seeds_and_optima_those_of_the_fits():
    rl_tables = read(arms())
    _, plotted = drawn("fig6_rl_lr", rl_tables)
    rows = only(plotted, "accuracy").set_index(["arm", "lr"])
    expected = rl_tables.runs.groupby(["method", "rank", "lr"], dropna=False)["final_reward"].mean()
    assert len(rows) == len(expected) == 3 * 7
    np.testing.assert_allclose(rows["accuracy"].sort_values(), expected.sort_values())
    best = rows.loc[("LoRA r16", 1e-3)]
    assert best[["accuracy", "accuracy_sd", "n_seeds"]].tolist() == pytest.approx([0.8, SD, 3])
    expected = optima(compared(rl_tables, with_error_rates(rl_tables.runs))).assign(accuracy=lambda row: 1 - row["nll"])
    shown = only(plotted, "optimum")
    for column in ("lr", "lr_low", "lr_high", "accuracy"):
        np.testing.assert_allclose(shown[column].astype(float), expected[column].astype(float))
    assert shown["lr"].tolist() == pytest.approx([1e-4, 1e-3, 1e-3], rel=0.05)


def test_what_has_not_learned_is_marked_and_counted():
    rl_tables = read(arms((1, 16), diverges_from=9e-3))
    figure, plotted = drawn("fig6_rl_lr", rl_tables)
    for status in ("diverged", "unrewarded"):
        expected = rl_tables.runs.query("status == @status")
        assert set(only(plotted, status)["run_id"]) == set(expected["run_id"])
    assert "2 diverged · 2 unrewarded" in texts(figure)
    marks = [line.get_marker() for line in figure.axes[0].get_lines()]
    assert marks.count("x") == marks.count("$0$") == 2


def test_the_base_and_controls_are_lines_with_an_entry():
    figure, plotted = draw("fig7_rl_curves", arms(constant_reward=0.03, rule_reward=0.2))
    heights = {"base": BASE, "constant": 0.03, "rule": 0.2}
    for element, height in heights.items():
        assert only(plotted, element)["accuracy"].tolist() == [height]
    for axes in figure.axes[:2]:
        for look, height in zip(("-", ":", "--"), heights.values(), strict=True):
            assert height in [line.get_ydata()[0] for line in lines(axes, linestyle=look)]
    assert {"best constant answer", "best cheap rule", "before training"} <= set(legend(figure))


def test_placement_shows_best_accuracies_by_parameters():
    chosen = {"attn": (0.6, 88_000), "mlp": (0.8, 144_000), "all": (0.8, 224_000)}
    adapters = [
        arm(16, optimum=1e-3, placement=placement, peak=peak, trainable_params=count)
        for placement, (peak, count) in chosen.items()
    ]
    rl_tables = read(arms((None,)) + adapters)
    figure, plotted = drawn("fig5_placement_rl", rl_tables)
    best = only(plotted, "best")
    [comparison] = compared(rl_tables, with_error_rates(rl_tables.runs))
    expected = [1 - comparison.fit.minima[label].value for label in best["arm"]]
    np.testing.assert_allclose(best["accuracy"].astype(float), expected)
    assert best.set_index("arm")["accuracy"]["LoRA r16 attn"] == pytest.approx(0.6)
    [band] = only(plotted, "margin_band").to_dict("records")
    assert band["accuracy_high"] == pytest.approx(best["accuracy"].max())
    # 10% of the gain of full fine-tuning over the base.
    fullft = best.set_index("arm")["accuracy"]["FullFT"]
    assert band["accuracy_high"] - band["accuracy_low"] == pytest.approx(0.1 * (fullft - BASE))
    assert [axes.get_ylabel() for axes in figure.axes] == ["final test accuracy", "accuracy at the best LR"]


def test_fig7_curves_are_test_accuracies_at_the_best_lr():
    rl_tables = read(arms())
    figure, plotted = drawn("fig7_rl_curves", rl_tables)
    curves, expected = only(plotted, "curve"), reward_curves(rl_tables.runs, rl_tables.curves, "test", "accuracy")
    for ours, theirs in (("accuracy", "mean"), ("accuracy_sd", "sd"), ("step", "step"), ("lr", "lr")):
        np.testing.assert_allclose(curves[ours].astype(float), expected[theirs].astype(float))
    assert curves.loc[curves["step"] == STEPS, "accuracy"].tolist() == pytest.approx([0.8] * 3)
    assert "3 seeds" in texts(figure, 0)


def test_fig8_shows_each_further_set():
    figure, plotted = draw("fig8_aime_and_length", arms())
    accuracy = only(plotted, "accuracy")
    assert set(accuracy["split"]) == set(AIME)
    at_end = accuracy[accuracy["step"] == STEPS].set_index(["split", "arm"])["mean"]
    assert {split for (split, _), mean in at_end.items() if mean == pytest.approx(AIME[split])} == set(AIME)
    labels = ["response length (tokens)", "KL (nats per token)", "share with reflection"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy on aime24", "accuracy on aime25", *labels]
    assert titles(figure) == ["tiny · problems", "", "", "", ""]
    assert texts(figure, 0) == "3 seeds · 480 answers"


def test_fig8_lengths_are_running_means_of_the_training_batches():
    zigzag = {"response_length": lambda done: 200 + 100 * done + (-1) ** round(done * 100)}
    once = read([arm(16, optimum=1e-3, max_new_tokens=500, train=zigzag)])
    twice = once.curves[once.curves["split"] == "train"]
    curves = pd.concat([once.curves, twice.assign(step=twice["step"] + STEPS)], ignore_index=True)
    _, plotted = drawn("fig8_aime_and_length", Tables(once.runs, curves))
    length = only(plotted, "response_length").set_index("step")["mean"]
    raw = reward_curves(once.runs, curves, "train", "response_length").set_index("step")["mean"]
    # A twentieth of 40 steps is two.
    assert length[10] == pytest.approx((raw[9] + raw[10]) / 2)


def test_fig8_draws_kl_without_its_sign_and_counts_runs_above_the_limit_at_any_lr():
    rl_tables = read([arm(16, optimum=1e-3, train={"kl": grown(0, -0.004)})])
    spikes = rl_tables.curves["run_id"].str.contains("-1e-05-") & (rl_tables.curves["metric"] == "kl")
    curves = rl_tables.curves.assign(value=rl_tables.curves["value"].mask(spikes, -0.02))
    figure, plotted = drawn("fig8_aime_and_length", Tables(rl_tables.runs, curves))
    kl, axes = only(plotted, "kl"), figure.axes[3]
    assert kl["mean"].tolist() == pytest.approx([0.004 * step / STEPS for step in range(1, STEPS + 1)])
    assert only(plotted, "above_max_kl")["lr"].tolist() == [1e-5]
    assert texts(figure, 3) == "3 seeds · 1 run above 0.01"
    assert [line.get_ydata()[0] for line in lines(axes, linestyle="--")] == [0.01]


ODD = {
    "every run diverged": lambda: changed(arms((None, 16)), "diverged"),
    "out of reach": lambda: changed(arms((None, 16), base_reward=0.0), "unrewarded", 0.0),
    "base not measured": lambda: arms((None, 16), base_reward=None, peak=1.0, curvature=0.0),
    "one set of two further": lambda: (
        arms((None, 16), dataset="a", sets={}) + arms((None, 16), model="$y", dataset="<b>$x^$&", sets={"x^$": 0.2})
    ),
    "hardly any curves": lambda: [(runs, points[:1]) for runs, points in arms((None, 16))],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ODD)
@pytest.mark.filterwarnings("error")
def test_odd_tables_are_drawn(case):
    for name in RL_FIGURES:
        lay_out(name, read(ODD[case]()))


def test_supervised_and_rl_runs_are_never_drawn_together():
    supervised, rl_tables = runs_table(make_sweep(None) + make_sweep(8)), read(arms())
    runs = pd.concat([supervised.assign(experiments=None), rl_tables.runs], ignore_index=True)
    for name, figure in FIGURES.items():
        if figure.table == "runs":
            assert (figure.own_runs(runs)["dataset"] == "problems").eq(figure.task == "rl").all(), name
