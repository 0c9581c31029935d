"""The figures of reinforcement learning, from tables made by hand."""

import numpy as np
import pandas as pd
import pytest

from lorabench.figures.catalog import FIGURES
from lorabench.figures.grid import rows_of
from lorabench.figures.rl import reward_curves, runs_above_max_kl
from lorabench.runs import MAX_KL
from lorabench.store.tables import Tables

from ..handmade import make_sweep, runs_table
from ..handmade.rl import AIME, BASE, OFFSETS, STEPS, arm, grown
from ..handmade.sft import tables
from .layout import draw as drawn
from .layout import lay_out, only, texts

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


def draw(name, arms):
    return drawn(name, read(arms))


def test_accuracies_are_means_over_seeds_and_optima_those_of_the_fits():
    figure, plotted = draw("fig6_rl_lr", arms(diverges_from=9e-3))
    rows = only(plotted, "accuracy").set_index(["arm", "lr"])
    assert len(rows) == 3 * 6
    best = rows.loc[("LoRA r16", 1e-3)]
    assert best[["accuracy", "accuracy_sd", "n_seeds"]].tolist() == pytest.approx([0.8, SD, 3])
    optimum = only(plotted, "optimum")
    assert optimum["lr"].tolist() == pytest.approx([1e-4, 1e-3, 1e-3], rel=0.05)
    assert optimum["lr"].between(optimum["lr_low"], optimum["lr_high"]).all()
    assert optimum["accuracy"].tolist() == pytest.approx([0.8] * 3, abs=0.01)
    # What has not learned is marked and counted.
    assert "3 diverged · 3 unrewarded" in texts(figure)
    marks = [line.get_marker() for line in figure.axes[0].get_lines()]
    assert marks.count("x") == marks.count("$0$") == 3


def test_fig8_shows_each_further_set_and_kl_without_its_sign_and_runs_above_the_limit_at_any_lr():
    rl_tables = read([arm(16, optimum=1e-3, train={"kl": grown(0, -0.004)}, max_new_tokens=500)])
    spikes = rl_tables.curves["run_id"].str.contains("-1e-05-") & (rl_tables.curves["metric"] == "kl")
    curves = rl_tables.curves.assign(value=rl_tables.curves["value"].mask(spikes, -0.02))
    figure, plotted = drawn("fig8_aime_and_length", Tables(rl_tables.runs, curves))
    at_end = only(plotted, "accuracy", step=STEPS).set_index("split")["mean"]
    assert at_end.to_dict() == pytest.approx(AIME)
    assert texts(figure, 0) == "3 seeds · 480 answers"
    assert only(plotted, "kl")["mean"].tolist() == pytest.approx([0.004 * step / STEPS for step in range(1, STEPS + 1)])
    assert only(plotted, "above_max_kl")["lr"].tolist() == [1e-5]
    assert texts(figure, 3) == "3 seeds · 1 run above 0.01"


REWARDS = ("final_valid_reward", "final_reward", "best_reward")
ODD = {
    "every run diverged": lambda: arms((None, 16), status="diverged", **dict.fromkeys(REWARDS)),
    "out of reach": lambda: arms((None, 16), status="unrewarded", base_reward=0.0, **dict.fromkeys(REWARDS, 0.0)),
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


def test_curves_near_the_optimal_lr_are_averaged_over_seeds():
    table = reward_curves(*tables([arm(optimum=1e-4), arm(8, optimum=1e-3, peak=0.7)]))
    lora = rows_of(table, {"method": "lora"}, ["method"])
    assert (list(lora["step"]), set(lora["lr"])) == (list(range(1, STEPS + 1)), {1e-3})
    last = lora.iloc[-1]
    assert (last["episodes"], last["n_seeds"], len(last["run_ids"])) == (64 * STEPS, len(OFFSETS), len(OFFSETS))
    assert (last["mean"], last["sd"]) == pytest.approx((0.7, OFFSETS[1]))


def test_runs_above_the_largest_kl_are_those_with_a_step_beyond_it_on_either_side():
    points = [("a", 0.002), ("a", -0.02), ("b", MAX_KL), ("c", 0.0)]
    curves = pd.DataFrame(points, columns=["run_id", "value"]).assign(step=1, split="train", metric="kl")
    assert runs_above_max_kl(curves) == {"a"}
