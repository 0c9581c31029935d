"""What all figures of runs have in common, and figures 1 to 3, from tables made by hand."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.comparison import comparisons
from lorabench.errors import UserError
from lorabench.figures.catalog import FIGURES, save_figure
from lorabench.figures.grid import envelopes
from lorabench.figures.style import arm_styles, write_figure
from lorabench.store.made_from import of_tables
from lorabench.store.tables import Tables

from ..claims.test_compute import compute_table
from ..handmade import LRS, curves_of, make_run, make_sweep, runs_table
from ..handmade.lora import lora_run
from .layout import draw, lay_out, lines, only, texts, titles

# Figures of supervised runs; here they get runs without an experiment, which belong to every figure.
RUN_FIGURES = [name for name, figure in FIGURES.items() if figure.table == "runs" and figure.task == "sft"]
ARMS = ["arm", "method", "rank", "placement"]
MARKUP = "<b>$x^$&"


def drawn(name: str, rows: list[dict]) -> tuple:
    runs = runs_table(rows)
    return draw(name, runs.assign(experiments=None), curves_of(runs))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with FullFT and a rank on a dataset with markup in its name."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [row for rank in (None, 16) for row in make_sweep(rank, dataset=MARKUP)]
    runs = runs_table(rows).drop(columns="experiments")
    runs.to_parquet(folder / "runs.parquet")
    curves_of(runs).to_parquet(folder / "curves.parquet")
    return folder


def test_save_writes_what_draw_returns_with_the_same_bytes_each_time(tables: Path, tmp_path: Path):
    name = "fig2_lr_by_rank"
    save_figure(name, [tables], tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {f"{name}.svg", f"{name}.png", f"{name}.csv"}
    assert b"<dc:date>" not in files[f"{name}.svg"]
    assert b"<b>" not in files[f"{name}.svg"], "names are plain text"
    read = Tables.read(tables)
    figure, plotted = FIGURES[name].draw(Tables(read.runs, read.curves))
    for kind in ("svg", "png"):
        write_figure(figure, tmp_path / f"again.{kind}", of_tables([tables], FIGURES[name].shows))
        assert (tmp_path / f"again.{kind}").read_bytes() == files[f"{name}.{kind}"]
    written = pd.read_csv(tmp_path / f"{name}.csv")
    assert list(written.columns) == list(plotted.columns)
    for column in written.select_dtypes("number"):
        numbers = plotted[column].to_numpy(float, na_value=np.nan)
        np.testing.assert_allclose(written[column].astype(float), numbers, rtol=1e-12, err_msg=column)


SPARSE = {
    "an arm with all runs diverged": make_sweep(None) + make_sweep(1, diverged_from=0.0),
    "no full fine-tuning": make_sweep(8),
    "one learning rate and no batch size in common": [make_run(None, 1e-3, batch_size=4), make_run(8, 1e-3)],
    "neither placement nor counts": [
        row | {"placement": None, "trainable_params": None} for rank in (None, 16) for row in make_sweep(rank)
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SPARSE)
def test_sparse_tables_are_drawn(case: str):
    for name in RUN_FIGURES:
        runs = runs_table(SPARSE[case])
        lay_out(name, runs.assign(experiments=None), curves_of(runs))


def test_a_figure_that_is_unknown_or_has_no_runs_is_refused(tables: Path, tmp_path: Path):
    with pytest.raises(UserError, match="fig1_envelopes"):
        save_figure("fig9", [tmp_path], tmp_path)
    with pytest.raises(UserError, match="no runs of the experiment rl_gsm8k or rl_math"):
        save_figure("fig6_rl_lr", [tables], tmp_path)


def test_panels_never_mix_models_datasets_or_batch_sizes():
    rows = make_sweep(8, diverged_from=5e-3) + make_sweep(8, dataset="worked") + make_sweep(8, model="owner/other")
    rows += [row | {"run_id": f"{row['run_id']}-b32", "batch_size": 32} for row in make_sweep(8)]
    figure, plotted = drawn("fig2_lr_by_rank", rows)
    panels = ["other · instruct · batch 16", "tiny · instruct · batch 16", "tiny · instruct · batch 32"]
    assert titles(figure) == [*panels, "tiny · worked · batch 16"]
    assert plotted.groupby(["model", "dataset", "batch_size"]).ngroups == 4
    lost = {row["run_id"] for row in rows if row["status"] == "diverged"}
    assert set(only(plotted, "diverged")["run_id"]) == lost


def test_fig1_draws_the_envelope_of_each_arm_and_says_the_loss_before_training():
    figure, plotted = drawn("fig1_envelopes", make_sweep(None) + make_sweep(1))
    for label, style in arm_styles(plotted.dropna(subset=["arm"])[ARMS]).items():
        envelope = only(plotted, "envelope", arm=label)
        # A log axis has no step 0.
        assert (envelope["step"] > 0).all()
        [line] = lines(figure.axes[0], color=style.colour, linewidth=style.linewidth)
        np.testing.assert_array_equal(line.get_xydata(), envelope[["step", "nll"]].to_numpy(float))
    assert only(plotted, "before_training")["nll"].item() == pytest.approx(4.2)
    assert "before training 4.20" in texts(figure)


def test_fig2_hides_no_loss_above_the_range_and_never_the_best_of_an_arm():
    rows = [*make_sweep(8), make_run(8, 0.0001, final_test_nll=40.0, final_valid_nll=40.0)]
    figure, plotted = drawn("fig2_lr_by_rank", rows)
    above = plotted[plotted["above_range"].eq(True)]
    assert above["nll"].tolist() == [40.0]
    assert figure.axes[0].get_ylim()[1] < 10
    rows = make_sweep(8) + [make_run(1, lr, final_test_nll=9.0 + lr, final_valid_nll=9.0 + lr) for lr in LRS]
    _, plotted = drawn("fig2_lr_by_rank", rows)
    best = plotted[(plotted["element"] == "loss") & (plotted["arm"] == "LoRA r1")].sort_values("nll").iloc[0]
    assert not best["above_range"]


PER_RANK = {"attn": 5_500, "mlp": 9_000, "all": 14_000}


def test_losses_and_gaps_by_batch_size_are_those_of_the_fits():
    rows = []
    for size in (4, 16, 64):
        for row in make_sweep(None, batch_size=size) + make_sweep(8, batch_size=size):
            rows.append(row | {"run_id": f"{row['run_id']}-b{size}", "steps": 640 // size})
    figure, plotted = drawn("fig3_batch_size", rows)
    final = only(plotted, "final").set_index(["batch_size", "arm"])
    gaps = only(plotted, "gap").set_index("batch_size")
    for comparison in comparisons(runs_table(rows), pd.DataFrame()):
        size = comparison.arms[0]["batch_size"]
        expected = comparison.fit.gap("LoRA r8", "FullFT")
        numbers = gaps.loc[size, ["gap", "low", "high"]].astype(float)
        np.testing.assert_allclose(numbers, [expected.value, *expected.interval()])
        for label, minimum in comparison.fit.minima.items():
            numbers = final.loc[(size, label), ["nll", "low", "high"]].astype(float)
            np.testing.assert_allclose(numbers, [minimum.value, *minimum.interval()])
    [line] = lines(figure.axes[4], linestyle="--")
    np.testing.assert_allclose(line.get_ydata(), gaps["gap"].astype(float))
    points = only(plotted, "envelope", arm="LoRA r8", batch_size=64)
    [line] = lines(figure.axes[2], linestyle="--")
    np.testing.assert_allclose(line.get_xydata(), points[["examples", "nll"]].to_numpy(float))


def test_losses_by_parameters_are_those_of_the_fit():
    rows = make_sweep(None)
    for placement, rank in (("attn", 16), ("attn", 27), ("mlp", 16), ("all", 16)):
        sweep = make_sweep(rank, placement=placement, trainable_params=PER_RANK[placement] * rank)
        rows += [row | {"run_id": f"{row['run_id']}-{placement}"} for row in sweep]
    figure, plotted = draw("fig4_placement", runs_table(rows))
    [comparison] = comparisons(runs_table(rows), pd.DataFrame())
    best = only(plotted, "best")
    expected = [[minimum.value, *minimum.interval()] for minimum in map(comparison.fit.minima.get, best["arm"])]
    np.testing.assert_allclose(best[["nll", "nll_low", "nll_high"]].astype(float), expected)
    band = only(plotted, "margin_band").iloc[0]
    assert band["nll_low"] == pytest.approx(best["nll"].min())
    assert band["nll_high"] - band["nll_low"] == pytest.approx(comparison.margin.value)
    # Placement is line style, and rank is colour.
    assert len({line.get_color() for line in lines(figure.axes[0], linestyle=":")}) == 2


def test_the_envelope_is_the_lowest_loss_at_each_step():
    losses = {"a": [5.0, 4.0, 3.0, 2.5], "b": [5.0, 3.5, 3.2, 2.4], "c": [5.0, 3.0, math.nan, math.nan]}
    runs = pd.DataFrame([lora_run(lr=lr) | {"run_id": run_id} for lr, run_id in enumerate(losses, 1)])
    curves = pd.DataFrame(losses).assign(step=[0, 1, 2, 4], tokens=[0, 100, 200, 400], examples=0)
    curves = curves.melt(["step", "tokens", "examples"], var_name="run_id").assign(split="validation", metric="nll")
    lowest = envelopes(runs, curves)
    assert lowest["value"].tolist() == [5.0, 3.0, 3.0, 2.4]
    assert lowest["run_id"].tolist() == ["a", "c", "a", "b"]
    assert lowest["n_runs"].tolist() == [3, 3, 2, 2]
    assert lowest["tokens"].tolist() == [0, 100, 200, 400]


def test_compute_draws_the_ratios_of_the_table_and_the_formula():
    none, compute = pd.DataFrame(), compute_table(step_s=[2.0, 1.0, 1.4, 3.0])
    figure, plotted = draw("compute", Tables(none, none, compute=compute))
    flops, measured = figure.axes
    wanted = {"counted": [0.68, 2 / 3 + 16 / 150, 2 / 3 + 128 / 150]}
    wanted |= {"step_time": [0.5, 0.7, 1.5], "memory": [0.5, 0.5, 0.5]}
    for axes, marker, element in ((flops, "o", "counted"), (measured, "s", "step_time"), (measured, "^", "memory")):
        [line] = lines(axes, marker=marker)
        rows = only(plotted, element)
        np.testing.assert_array_equal(line.get_xydata(), rows[["rank", "ratio"]].to_numpy(float))
        assert rows["rank"].tolist() == [1, 8, 64]
        np.testing.assert_allclose(rows["ratio"], wanted[element])
    formula = only(plotted, "formula")
    np.testing.assert_allclose(formula["ratio"], 2 / 3 + 2 * formula["rank"] / 150)
