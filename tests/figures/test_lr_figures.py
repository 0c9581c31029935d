"""The figures about learning rates: the LR law, short and long runs, and published losses in figure 2."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis import published
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.lr_law import METHODS, PUBLISHED, LrLaw, fit_lr_law, predict_lr, swept_models
from lorabench.figures.grid import optima

from ..handmade.sft import CURVATURE, OFFSETS, arm, tables
from .layout import DIVERGED, draw, legend, only, texts

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


ODD_MODELS = {
    "all diverged": lambda: models()[0].assign(**DIVERGED),
    "no sizes": lambda: models()[0].drop(columns=["family", "hidden_size"]),
    "a family without a published law": lambda: models({"g": ("gemma3", 64), "l": ("llama", 64)})[0],
}


@pytest.mark.filterwarnings("error")
def test_law_of_odd_tables():
    for case, make in ODD_MODELS.items():
        runs = make()
        _, plotted = draw("lr_law", runs)
        assert len(only(plotted, "diverged")) == (runs["status"] == "diverged").sum(), case
        assert only(plotted, "published_law")["lr"].notna().all(), case
    runs, _ = models()
    figure, _ = draw("lr_law", runs[(runs["model"] != "q96") | (runs["method"] == "lora")])
    assert "not drawn: q96" in texts(figure, 0)


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
