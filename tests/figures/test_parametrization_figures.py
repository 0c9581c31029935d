"""The figures on early curves, the parametrization, its variants and learning rates, from tables made by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis import published
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.lr_law import METHODS, PUBLISHED, LrLaw, fit_lr_law, predict_lr, swept_models
from lorabench.figures.grid import optima

from ..handmade.lora import a_moved, lora_run, lora_tables, nll
from ..handmade.sft import CURVATURE, OFFSETS, arm, tables
from .layout import DIVERGED, draw, lay_out, legend, lines, only, texts

SEEDS = range(3)


def grid(*configurations, **columns):
    return [lora_run(**(columns | config), seed=seed) for config in configurations for seed in SEEDS]


def sign(step):
    return -1 if step < 10 else 1


def early_tables():
    def loss(run, step):
        return nll(run, step) + (0.001 * sign(step) * step * (1 + 0.1 * run["seed"]) if run["rank"] == 4 else 0.0)

    return lora_tables(grid(*({"rank": rank} for rank in (1, 4, 64)), steps=32), nll=loss)


def test_early_curves_are_means_over_seeds_and_differences_show_their_sign():
    figure, plotted = draw("early", *early_tables())
    run = lora_run(64, lr=1e-3)
    expected = np.mean([nll(run | {"seed": seed}, 5) for seed in SEEDS])
    assert only(plotted, "curve", arm="LoRA r64", step=5)["nll"].item() == pytest.approx(expected)
    rows = only(plotted, "difference").set_index("step")
    # The lowest rank is 1, which the paper's figure does not have.
    assert rows[["rank", "other_rank"]].drop_duplicates().to_numpy().tolist() == [[4, 64]]
    for step in (2, 9, 10, 32):
        assert rows.loc[step, "difference"] == pytest.approx(0.001 * sign(step) * step * 1.1)
    [below] = lines(figure.axes[1], markerfacecolor="white")
    assert list(below.get_xdata()) == list(range(1, 10))
    assert (below.get_ydata() > 0).all()


CONFIGURATIONS = [
    {"rank": 1},
    {"rank": 8},
    {"rank": 16},
    {"rank": 16, "alpha": 128.0},
    {"rank": 16, "alpha": 512.0},
    {"rank": 8, "alpha": 16.0, "init_a": 2.0, "lr": 2e-3, "lr_ratio": 0.5},
    {"rank": 8, "lr": 4e-3},
    {"rank": 8, "lr": 1e-5},
]


def test_descents_by_rule_equivalent_pairs_and_times_until_a_moves():
    def wobble(run, step):
        return nll(run, step) + (1e-7 * step if run["lr_ratio"] != 1 else 0.0)

    figure, plotted = draw("parametrization", *lora_tables(grid(*CONFIGURATIONS), nll=wobble))
    rows = only(plotted, "first_descent").set_index(["rule", "rank"])["value"]
    assert rows["alpha / r", 1] == pytest.approx(1.0, abs=0.05)
    assert rows["alpha / sqrt(r)", 1] == pytest.approx(1 / 4, rel=0.05)
    assert rows["constant factor", 1] == pytest.approx(1 / 16, rel=0.05)
    last = only(plotted, "equivalent", step=50)
    assert last["value"].item() == pytest.approx(5e-6, rel=1e-4)
    assert last["n"].item() == len(SEEDS)
    others = only(plotted, "not_equivalent", step=50)
    # The four configurations of the setting have five other pairs.
    assert others["n"].item() == 5 * len(SEEDS)
    assert 1e-5 < others["value"].item() == others["low"].item() < others["high"].item()
    moved = only(plotted, "a_moved", time_scale=250)
    assert a_moved({"init_a": 1.0, "lr": 4e-3}, 1 + 12.5) == pytest.approx(1.0)
    assert moved["value"].item() == pytest.approx(13.5, rel=0.03)
    assert only(plotted, "a_not_moved")["value"].tolist() == [64]
    assert only(plotted, "update_norm", arm="LoRA r16", step=1)["value"].item() == pytest.approx(1.0)
    triangles = lines(figure.axes[2], marker="^")
    assert [line.get_xdata()[0] for line in triangles] == [pytest.approx(1e5)]


def variant_tables(*configurations, **columns):
    standard = {"alpha": 32.0, "lr_ratio": 1.0}
    return tables(
        arm(16, init_a=1.0, **({"optimum": 3.2e-3} | standard | config | columns))
        for config in (standard, *configurations)
    )


ODD = {
    "no curve table": lambda runs, curves: (runs, pd.DataFrame()),
    "NaN": lambda runs, curves: (runs, curves.assign(value=math.nan)),
    "every run diverged": lambda runs, curves: (runs.assign(**DIVERGED), curves),
    "no parametrization": lambda runs, curves: (runs.drop(columns=["alpha", "init_a", "lr_ratio", "eps"]), curves),
    "variants of one seed": lambda *_: variant_tables({"alpha": 8.0}, offsets=(0.0,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ODD)
def test_odd_tables_are_drawn(case):
    for name in ("early", "parametrization", "variants"):
        lay_out(name, *ODD[case](*early_tables()))


LAW = LrLaw(base=1e-4, multiplier=8.0, exponents={"llama": 0.78, "qwen": 0.08, "gemma3": 0.5})
MODELS = {"l64": ("llama", 64), "l128": ("llama", 128), "q64": ("qwen3", 64), "q96": ("qwen3_moe", 96)}
LENGTHS = {"step": [25, 50, 100, 400], "ratio": [20.0, 16.0, 14.0, 10.0]}


def models(chosen=MODELS):
    arms = []
    for name, (family, hidden_size) in chosen.items():
        for rank in (None, 16):
            optimum = predict_lr(LAW, family, hidden_size, "fullft" if rank is None else "lora")
            lrs = [optimum * factor for factor in (1 / 9, 1 / 3, 1, 3, 9)]
            about = {"model": name, "family": family, "hidden_size": hidden_size, "lrs": lrs}
            arms.append(arm(rank, optimum=optimum, **about))
    return tables(arms)


def lengths():
    """Make runs whose LR ratio at each step is that of LENGTHS."""
    runs, _ = tables(arm(rank, optimum=optimum, steps=400) for rank, optimum in ((None, 3e-4), (16, 3e-3)))
    points = runs[["run_id", "method", "lr", "seed"]].merge(pd.DataFrame(LENGTHS), "cross")
    optimum = 3e-4 * points["ratio"].where(points["method"] == "lora", 1)
    luck = points["seed"].map(dict(enumerate(OFFSETS)))
    points["value"] = 2.1 + CURVATURE * np.log(points["lr"] / optimum) ** 2 + luck
    return runs, points[["run_id", "step", "value"]].assign(split="validation", metric="nll")


@pytest.mark.slow
def test_law_draws_the_optima_and_ratios_of_the_tables():
    runs, curves = models()
    _, plotted = draw("lr_law", runs)
    expected = optima(comparisons(runs, pd.DataFrame())).set_index(["model", "method"])
    shown = only(plotted, "optimum").set_index(["model", "method"])
    assert len(shown) == 8
    np.testing.assert_allclose(shown["lr"].astype(float), expected["lr"].reindex(shown.index).astype(float))
    ratio = only(plotted, "ratio").set_index("model")
    assert ratio["ratio"].to_dict() == pytest.approx(dict.fromkeys(MODELS, 8.0))
    # Lines are those of the fit and of the published constants.
    [group] = swept_models(comparisons(runs.assign(eps=None, alpha=None, init_a=None, lr_ratio=None), curves))
    fitted = fit_lr_law([model.arm_optimum(method) for model in group for method in METHODS])
    for element, law in (("law", fitted), ("published_law", PUBLISHED)):
        points = only(plotted, element)
        assert len(points) == 2 * 2 * 2
        for point in points.to_dict("records"):
            expected = predict_lr(law, point["family"], point["hidden_size"], point["method"])
            assert point["lr"] == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_law_of_odd_tables():
    runs, _ = models({"g": ("gemma3", 64), "l": ("llama", 64)})
    _, plotted = draw("lr_law", runs.assign(**DIVERGED))
    assert len(only(plotted, "diverged")) == len(runs)
    figure, plotted = draw("lr_law", runs[(runs["model"] != "l") | (runs["method"] == "lora")])
    assert only(plotted, "published_law")["lr"].notna().all()
    assert "not drawn: l" in texts(figure, 0)


def test_short_run_draws_losses_as_of_each_length():
    runs, curves = lengths()
    _, plotted = draw("short_run", runs, curves)
    measured = curves.merge(runs[["run_id", "method", "lr"]], on="run_id").groupby(["step", "method", "lr"])["value"]
    shown = only(plotted, "loss").set_index(["steps", "method", "lr"])["nll"]
    assert shown.to_dict() == pytest.approx(measured.mean().loc[[50, 100, 400]].to_dict())
    ratio = only(plotted, "ratio").set_index("steps")
    assert ratio["ratio"].to_dict() == pytest.approx(dict(zip(*LENGTHS.values(), strict=True)))


def test_fig2_overlays_published_losses_of_the_same_model_and_data_only():
    about = {"optimum": 3e-4, "floor": 0.6, "model": "Llama-3.1-8B"}
    for dataset, arms in (("no_robots", []), ("tulu3", ["LoRA r128", "LoRA r16", "LoRA r4", "LoRA r64"])):
        runs, _ = tables(arm(rank, dataset=dataset, **about) for rank in (None, 8))
        figure, plotted = draw("fig2_lr_by_rank", runs)
        assert sorted(only(plotted, "published")["arm"].unique()) == arms
        words = legend(figure)
        assert any(text.startswith("published") for text in words) == bool(arms)
        # Only the arms of our own runs have a colour.
        assert [text for text in words if text.startswith(("FullFT", "LoRA"))] == ["FullFT", "LoRA r8"]
    # The last are those of the file.
    shown = only(plotted, "published").set_index(["rank", "lr"])["nll"]
    sweep = pd.read_csv(published.REFERENCE / "tinker_sft_sweep.csv")
    sweep = sweep[sweep["model"] == "meta-llama/Llama-3.1-8B"].groupby(["rank", "lr"])["test_nll"].mean()
    assert shown.to_dict() == pytest.approx(sweep.to_dict())
