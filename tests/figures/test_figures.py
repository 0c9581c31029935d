"""Figures from tables made by hand."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lorabench.errors import UserError
from lorabench.figures.catalog import FIGURES, OWN_TABLES
from lorabench.figures.catalog import drawable_figures, save_figure
from lorabench.figures.style import ArmStyle, arm_styles, write_figure
from lorabench.store.io import with_all_columns
from lorabench.store.tables import Tables

from ..conftest import slow_but
from ..handmade import LRS, curves_of, make_run, make_sweep, runs_table
from .layout import lay_out

# Figures of supervised runs; here they get runs without an experiment, which belong to every figure.
OF_RUNS = [name for name, figure in FIGURES.items() if figure.experiments not in OWN_TABLES and figure.task == "sft"]
# Figures that show every run; other figures show only the runs at the best LR, or a part of the runs.
OF_RANK = ["fig1_envelopes", "fig2_lr_by_rank"]
ARMS = ["arm", "method", "rank", "placement"]
MARKUP = "<b>$x^$&"


def draw(name: str, rows: list[dict]) -> tuple:
    runs = runs_table(rows)
    return FIGURES[name].draw(Tables(runs, curves_of(runs)))


def lines_of(figure, arm: ArmStyle, panel: int = 0) -> list:
    """Return the lines of an arm that show data, without its marks."""
    lines = figure.axes[panel].get_lines()
    return [line for line in lines if line.get_color() == arm.colour and line.get_linewidth() == arm.linewidth]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with FullFT and two ranks on two datasets, one of them with markup in its name."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [row for rank in (None, 1, 16) for row in make_sweep(rank)]
    rows += [row for rank in (None, 16) for row in make_sweep(rank, dataset=MARKUP)]
    runs = runs_table(rows).drop(columns="experiments")
    runs.to_parquet(folder / "runs.parquet")
    curves_of(runs).to_parquet(folder / "curves.parquet")
    return folder


def test_registry_is_cheap_to_import():
    heavy = "import sys, lorabench.figures; print({'pandas', 'matplotlib', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", slow_but("fig2_lr_by_rank", OF_RUNS))
def test_save_writes_what_draw_returns_with_the_same_bytes_each_time(name: str, tables: Path, tmp_path: Path):
    save_figure(name, [tables], tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {f"{name}.svg", f"{name}.png", f"{name}.csv"}
    assert all(files.values())
    assert b"<dc:date>" not in files[f"{name}.svg"]
    assert b"<b>" not in files[f"{name}.svg"], "names are plain text"
    read = Tables.read(tables)
    figure, plotted = FIGURES[name].draw(Tables(with_all_columns(read.runs, "runs"), read.curves))
    for kind in ("svg", "png"):
        write_figure(figure, tmp_path / f"again.{kind}")
        assert (tmp_path / f"again.{kind}").read_bytes() == files[f"{name}.{kind}"]
    written = pd.read_csv(tmp_path / f"{name}.csv")
    assert list(written.columns) == list(plotted.columns)
    assert len(written) == len(plotted)
    for column in written.select_dtypes("number"):
        drawn = plotted[column].to_numpy(float, na_value=np.nan)
        np.testing.assert_allclose(written[column].astype(float), drawn, rtol=1e-12, err_msg=column)


@pytest.mark.slow
def test_somebody_elses_runs_without_curves_and_with_few_columns(tmp_path: Path):
    kept = ["run_id", "model", "dataset", "method", "rank", "placement", "lr", "batch_size", "seed", "status"]
    rows = [row for rank in (None, 1, 16) for row in make_sweep(rank)]
    runs = runs_table(rows)[[*kept, "final_valid_nll", "final_test_nll"]]
    runs.to_csv(tmp_path / "runs.csv", index=False)
    assert drawable_figures([tmp_path]) == OF_RUNS
    for name in OF_RUNS:
        save_figure(name, [tmp_path], tmp_path / "drawn")
    assert {path.name for path in (tmp_path / "drawn").glob("*.svg")} == {f"{name}.svg" for name in OF_RUNS}
    with pytest.raises(UserError, match="there is no table compute"):
        save_figure("compute", [tmp_path], tmp_path / "drawn")


@pytest.mark.parametrize("name", OF_RANK)
def test_diverged_runs_are_in_the_csv(name: str):
    rows = make_sweep(None) + make_sweep(8, diverged_from=5e-3)
    _, plotted = draw(name, rows)
    diverged = plotted[plotted["element"] == "diverged"]
    assert set(diverged["run_id"]) == {row["run_id"] for row in rows if row["status"] == "diverged"}
    assert len(diverged) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_RUNS)
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(make_sweep(None) + make_sweep(1, diverged_from=0.0), id="an arm with all runs diverged"),
        pytest.param(make_sweep(None, diverged_from=0.0), id="every run diverged"),
        pytest.param([make_run(None, 1e-3), make_run(8, 1e-3)], id="one learning rate"),
        pytest.param([make_run(None, 1e-3)], id="one run"),
        pytest.param(make_sweep(8), id="no full fine-tuning"),
    ],
)
def test_sparse_tables_are_drawn(name: str, rows: list[dict]):
    runs = runs_table(rows)
    figure, plotted = FIGURES[name].draw(Tables(runs.assign(experiments=None), curves_of(runs)))
    lay_out(figure)
    assert list(plotted.columns)


def test_unknown_figure_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="fig1_envelopes"):
        save_figure("fig9", [tmp_path], tmp_path)


@pytest.mark.parametrize("name", ["fig1_envelopes", "fig2_lr_by_rank"])
def test_panels_never_mix_models_datasets_or_batch_sizes(name: str):
    rows = make_sweep(8) + make_sweep(8, dataset="worked") + make_sweep(8, model="other")
    rows += [row | {"run_id": f"{row['run_id']}-b32", "batch_size": 32} for row in make_sweep(8)]
    figure, plotted = draw(name, rows)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "other · instruct · batch 16",
        "tiny · instruct · batch 16",
        "tiny · instruct · batch 32",
        "tiny · worked · batch 16",
    ]
    assert plotted.groupby(["model", "dataset", "batch_size"]).ngroups == 4


def test_fig1_draws_the_envelope_of_each_arm():
    figure, plotted = draw("fig1_envelopes", make_sweep(None) + make_sweep(1))
    for label, style in arm_styles(plotted.dropna(subset=["arm"])[ARMS]).items():
        envelope = plotted[(plotted["element"] == "envelope") & (plotted["arm"] == label)]
        (line,) = lines_of(figure, style)
        np.testing.assert_array_equal(line.get_xdata(), envelope["step"].astype(float))
        np.testing.assert_array_equal(line.get_ydata(), envelope["nll"])


def test_fig1_leaves_no_step_0_on_the_log_axis_but_says_the_loss_before_training():
    figure, plotted = draw("fig1_envelopes", make_sweep(None))
    assert (plotted.loc[plotted["element"] == "envelope", "step"] > 0).all()
    assert plotted.loc[plotted["element"] == "before_training", "nll"].item() == pytest.approx(4.2)
    assert any("before training 4.20" in text.get_text() for text in figure.axes[0].texts)


def test_fig1_marks_where_rank_1_leaves_the_band():
    _, plotted = draw("fig1_envelopes", make_sweep(None) + make_sweep(1))
    departed = plotted[plotted["element"] == "departure"]
    assert list(departed["arm"]) == ["LoRA r1"]
    band = plotted[plotted["element"] == "noise_band"].set_index("step")
    assert departed["nll"].item() > band.loc[departed["step"].item(), "nll_high"]


def test_fig1_has_no_band_where_the_noise_is_unknown():
    figure, plotted = draw("fig1_envelopes", make_sweep(None, seeds=1))
    assert "noise_band" not in set(plotted["element"])
    assert any("unknown" in text.get_text() for text in figure.axes[0].texts)


def test_fig2_is_the_mean_over_seeds_with_their_deviation():
    rows = make_sweep(8)
    _, plotted = draw("fig2_lr_by_rank", rows)
    loss = plotted[plotted["element"] == "loss"].set_index("lr")
    at_best = [row["final_test_nll"] for row in rows if row["lr"] == 3e-3]
    assert loss.loc[3e-3, "n_seeds"] == len(at_best) == 3
    assert loss.loc[3e-3, "nll"] == pytest.approx(np.mean(at_best))
    assert loss.loc[3e-3, "nll_sd"] == pytest.approx(np.std(at_best, ddof=1))
    assert loss["nll_sd"].notna().sum() == 1


def test_fig2_hides_no_loss_above_the_range():
    rows = [*make_sweep(8), make_run(8, 0.0001, final_test_nll=40.0, final_valid_nll=40.0)]
    figure, plotted = draw("fig2_lr_by_rank", rows)
    above = plotted[plotted["above_range"].eq(True)]
    assert above["nll"].tolist() == [40.0]
    assert figure.axes[0].get_ylim()[1] < 10
    triangles = [line for line in figure.axes[0].get_lines() if line.get_marker() == "^"]
    assert [line.get_xdata()[0] for line in triangles] == [1e-4]


def test_fig2_never_puts_the_best_loss_of_an_arm_above_the_range():
    rows = make_sweep(8) + [make_run(1, lr, final_test_nll=9.0 + lr, final_valid_nll=9.0 + lr) for lr in LRS]
    _, plotted = draw("fig2_lr_by_rank", rows)
    best = plotted[(plotted["element"] == "loss") & (plotted["arm"] == "LoRA r1")].sort_values("nll").iloc[0]
    assert not best["above_range"]


def test_fig2_marks_an_optimum_at_the_edge_as_not_resolved():
    figure, plotted = draw("fig2_lr_by_rank", make_sweep(8, lrs=[3e-4, 1e-3, 3e-3], diverged_from=1.0))
    assert not plotted.loc[plotted["element"] == "optimum", "resolved"].item()
    diamonds = [line for line in figure.axes[0].get_lines() if line.get_marker() == "D"]
    assert [line.get_markerfacecolor() for line in diamonds] == ["white"]


def test_colours_darken_with_rank_and_fullft_is_black():
    rows = [row for rank in (None, 1, 4, 16, 64, 512) for row in make_sweep(rank)]
    _, plotted = draw("fig2_lr_by_rank", rows)
    styles = arm_styles(plotted[ARMS])
    assert list(styles) == ["FullFT", "LoRA r1", "LoRA r4", "LoRA r16", "LoRA r64", "LoRA r512"]
    assert styles["FullFT"].colour == "black"
    grey = [
        sum(weight * int(style.colour[place : place + 2], 16) for weight, place in ((0.3, 1), (0.59, 3), (0.11, 5)))
        for label, style in styles.items()
        if label != "FullFT"
    ]
    assert grey == sorted(grey, reverse=True)
    assert min(a - b for a, b in itertools.pairwise(grey)) > 10
