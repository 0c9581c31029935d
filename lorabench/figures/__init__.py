"""The paper's figures, in the paper's order, redrawn from tidy tables.

Importing this package is cheap (no pandas, no matplotlib), so that the workflow can ask for the names.
A new figure is a module with a function `draw(tables)` and an entry here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lorabench.tables import Tables


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper. `name` is its module and file name, `experiment` the one whose tables it reads."""

    name: str
    title: str
    caption: str
    experiment: str

    def draw(self, tables: Tables) -> tuple[Figure, pd.DataFrame]:
        """The figure and, tidy, exactly what it plots."""
        drawn: tuple[Figure, pd.DataFrame] = import_module(f"{__name__}.{self.name}").draw(tables)
        return drawn


_PLACEMENT = (
    "Solid lines and circles are LoRA on all layers, dashed and crosses on the MLP (in a mixture of experts, on the "
    "experts), dotted and triangles pointing down on attention; colour is rank, black full fine-tuning. Left: final "
    "test loss (nats per scored token) against learning rate, the mean over seeds where there are several, with their "
    "standard deviation as error bar. A diamond is the optimum of an arm, interpolated on the first seed's grid, and "
    "its bar the 95% bootstrap interval of the optimal learning rate; an open one is not resolved. Above the panel, a "
    "triangle is a loss beyond the range shown and a cross a run that diverged. Right: test loss at an arm's best "
    "learning rate, mean over seeds with 95% interval, against its trainable parameters, which are listed below the "
    "panel; open where the best learning rate is at the edge of its grid. The grey band is two seed standard "
    "deviations to either side of the lowest, where repeats let them be measured."
)

FIGURES = {
    figure.name: figure
    for figure in (
        PaperFigure(
            name="fig1_envelopes",
            title="Figure 1. Learning curves by LoRA rank",
            caption=(
                "Validation loss (nats per scored token) against training step. Each line is the envelope of one "
                "arm: at every step the lowest loss over its learning rates, so it is not a single run. Black is full "
                "fine-tuning; colour is LoRA rank. The grey band is two seed standard deviations to either side of "
                "the lowest envelope, where repeats let them be measured. An open circle marks the step from which "
                "an arm stays above that band to the end."
            ),
            experiment="rank",
        ),
        PaperFigure(
            name="fig2_lr_by_rank",
            title="Figure 2. Final loss against learning rate by LoRA rank",
            caption=(
                "Final test loss (nats per scored token) against learning rate, the mean over seeds where there are "
                "several, with their standard deviation as error bar. A diamond is the optimum of an arm, "
                "interpolated on the first seed's grid, and its bar the 95% bootstrap interval of the optimal "
                "learning rate. An open diamond is not resolved: it or its interval is at the edge of the grid, the "
                "grid is too coarse there, or the seed noise is unknown. Above a panel, a triangle is a loss beyond "
                "the range shown and a cross a run that diverged. Grey lines, darker with rank, are losses that "
                "others published for the model and dataset of a panel, where there are such; their data order, "
                "chat template, schedule and length may differ."
            ),
            experiment="rank",
        ),
        PaperFigure(
            name="fig3_batch_size",
            title="Figure 3. LoRA against full fine-tuning by batch size",
            caption=(
                "Above, one panel per batch size: validation loss (nats per scored token) against examples seen; each "
                "line is the envelope of an arm, at every step the lowest loss over its learning rates. The range is "
                "that of the losses after the first tenth of the data. Black and solid is full fine-tuning, coloured "
                "and dashed LoRA by rank; diverged runs are counted. Below, against batch size and side by side where "
                "arms share one: left the final test loss at an arm's best learning rate, mean over seeds; right "
                "LoRA's minus that of full fine-tuning, paired by seed. Bars are 95% intervals over seeds, there "
                "where there are several. An open mark has its best learning rate at the edge of its grid."
            ),
            experiment="batch_size",
        ),
        PaperFigure(
            name="fig4_placement",
            title="Figure 4. Final loss by the layers that carry LoRA",
            caption=_PLACEMENT,
            experiment="placement",
        ),
        PaperFigure(
            name="fig5_placement_small",
            title="Figure 5. Final loss by the layers that carry LoRA, on a small dataset",
            caption=_PLACEMENT,
            experiment="placement_small",
        ),
        PaperFigure(
            name="capacity",
            title="Capacity. Where a rank leaves the shared curve",
            caption=(
                "Left: how far each arm's envelope (at every step the lowest validation loss over its learning rates) "
                "is above the lowest envelope, in nats per scored token, against training step; linear within the grey "
                "band of two seed standard deviations, logarithmic above it. Black is full fine-tuning, colour LoRA "
                "rank. An open circle marks the step from which an arm stays above the band to the end. Right: train "
                "tokens seen by then against adapter parameters; the bar reaches down to the last point within the "
                "band. A rank that is above the band from its first point on has no circle here, and a triangle is a "
                "rank that never left, at all tokens that it was trained on. The line is a power law, its slope with "
                "95% interval (shaded) is above the panel; dotted is slope 1, tokens proportional to parameters. The "
                "dashed line is where 2 bits per parameter hold the summed loss of the first epoch, the most that the "
                "data could ask for. Diverged runs are counted."
            ),
            experiment="capacity",
        ),
        PaperFigure(
            name="memorisation",
            title="Memorisation. Bits of random facts stored, by trainable parameters",
            caption=(
                "Bits stored of random facts (their entropy less what it still costs to write them with the trained "
                "model; measured on the facts trained on) against trainable parameters, at the learning rate with the "
                "lowest loss. Colour is LoRA rank, a black square full fine-tuning. A short bar is one seed, a filled "
                "mark their mean, and its line the 95% interval. Dotted and dashed lines are 1 and 2 bits per "
                "parameter, the level line is all there is to store. A rank that stored nothing is named above the "
                "panel, and diverged runs are counted."
            ),
            experiment="capacity",
        ),
        PaperFigure(
            name="lr_law",
            title="Optimal learning rate against hidden size",
            caption=(
                "Left: optimal learning rate of each model, interpolated on the first seed's grid, with its 95% "
                "bootstrap interval; black is full fine-tuning, colour LoRA. Circles and solid lines are the Llama "
                "family, squares and dashed lines Qwen, triangles and dotted lines others. Lines in colour and "
                "black are the law fitted here, LR = base * M * (2000 / hidden size) ** exponent with M 1 for full "
                "fine-tuning, its constants above the panel. Grey: the law with the constants in the authors' code, "
                "and published optima (open at the edge of their grid); these are of other data, batch sizes and "
                "lengths, on which a learning rate depends. Right: ratio of LoRA's optimum to that of full "
                "fine-tuning with its 95% interval, against the paper's 10 and the naive derivation's hidden size / "
                "64. An open mark is not resolved: its optimum or interval is at the edge of the grid, or the seed "
                "noise is unknown. Diverged runs are counted."
            ),
            experiment="lr_law",
        ),
        PaperFigure(
            name="short_run",
            title="Learning rates of short and long runs",
            caption=(
                "Loss against learning rate had training ended at a step, by the validation loss there (nats per "
                "scored token; the mean over seeds where there are several, with their standard deviation as error "
                "bar). With a constant learning rate the first steps of a long run are a short run. A diamond is "
                "the optimum of an arm, interpolated on the first seed's grid, and its bar the 95% bootstrap "
                "interval of the optimal learning rate; an open one is not resolved. Above a panel, a triangle is a "
                "loss beyond the range shown and a cross a run that diverged by then. Last panel: LoRA's optimal "
                "learning rate over that of full fine-tuning by length, with its 95% interval; dashed, the paper's "
                "ratios for long and short runs."
            ),
            experiment="short_run",
        ),
        PaperFigure(
            name="early",
            title="Early curves. Training loss by LoRA rank at one learning rate",
            caption=(
                "Left: training loss (nats per scored token) of each step's batch before its update, by LoRA rank, all "
                "at one learning rate and on the same batches; mean over seeds, each with its own data order. Right: "
                "by how much the loss of the lowest rank above 1 differs from that of the highest on the same batches, "
                "mean over seeds, without its sign: filled where the lower rank has the higher loss, open where it has "
                "the lower. Points below the grey line, the half width of their 95% interval over seeds, can't be told "
                "from zero. Dashed: two standard deviations of the training loss over batches. Before the first update "
                "the difference is zero, which has no place on the axis. Diverged runs are left out and counted."
            ),
            experiment="early",
        ),
        PaperFigure(
            name="parametrization",
            title="Parametrization. What alpha/r, A's initial scale and the two learning rates do",
            caption=(
                "First update: first-order fall of the loss by the first update over that of the highest rank, by how "
                "the factor before BA depends on rank r; mean over seeds with 95% interval, band 5% to either side of "
                "equal. Redundant pair: largest difference of the training loss up to a step (nats per scored token), "
                "of runs that should be one run since alpha * init_A * LR_B and init_A / LR_A are the same (black, the "
                "largest of all pairs) and of others (grey, all pairs; dashed, the smallest); dotted is numerical "
                "precision. When A moves: steps until A has moved by its own initial norm, geometric mean over seeds "
                "with 95% interval, against init_A (in units of 1/sqrt(d_in)) over the learning rate of A; dotted is "
                "slope 1, and an open triangle, at the end of its runs, one that did not get there. Size of updates: "
                "Frobenius norm of the change of W by one step over the learning rate, in the standard parametrisation "
                "at its best learning rate, mean over seeds with 95% interval; dashed, runs with a tenth or less of "
                "the learning rate of A and the same one of B, so that A is still. Colour is LoRA rank."
            ),
            experiment="parametrization",
        ),
        PaperFigure(
            name="variants",
            title="Variants. Alpha and LoRA+ against the standard parametrisation, each LR-tuned",
            caption=(
                "Left: final test loss (nats per scored token) at the best learning rate of each variant of alpha and "
                "of the ratio of B's learning rate to A's, mean over seeds with 95% interval. The square is the "
                "standard parametrisation, and the grey band two seed standard deviations to either side of it, where "
                "repeats let them be measured; a variant is better if it is to the left of the band. An open mark has "
                "its best learning rate at the edge of its grid. Right: optimal learning rate of A, interpolated on "
                "the first seed's grid, with its 95% bootstrap interval; an open diamond is not resolved. Diverged "
                "runs are counted."
            ),
            experiment="parametrization",
        ),
        PaperFigure(
            name="compute",
            title="Compute. FLOPs, time and memory of a training step",
            caption=(
                "A training step of LoRA over one of full fine-tuning, by rank. Left: FLOPs of the linear layers, "
                "forward and backward. Circles are counted as the model runs, every layer with the gradient of its "
                "input; the grey line is the paper's 2/3 + 2R/N, where N (above the panel) is the width of square "
                "layers that would give the same ratio, and the dotted line its limit 2/3. Right: measured on the "
                "machine named above the panel, median time of an optimizer step (squares) and peak memory "
                "(triangles). The black line is as much as full fine-tuning takes."
            ),
            experiment="compute",
        ),
        PaperFigure(
            name="loss_by_flops",
            title="Learning curves by training FLOPs",
            caption=(
                "Validation loss (nats per scored token) against the FLOPs that training has spent, counted in the "
                "linear layers. Each line is the envelope of one arm: at every step the lowest loss over its learning "
                "rates, so it is not a single run. Black is full fine-tuning; colour is LoRA rank. Above a panel, the "
                "seed standard deviation and the number of runs that diverged."
            ),
            experiment="rank",
        ),
    )
}


def drawable(tables: Path) -> list[str]:
    """Figures that the tables in a folder hold something for; all on runs, if those do not say of what experiment.

    Raises:
        UserError: the folder holds no tables, or one that can't be read.
    """
    from lorabench.tables import Tables

    found = Tables.read(tables)
    experiments = {figure.experiment for figure in FIGURES.values()} - {"compute"}
    if "experiments" in found.runs:
        experiments = {name for names in found.runs["experiments"] for name in names}
    experiments |= set() if found.compute.empty else {"compute"}
    return [name for name, figure in FIGURES.items() if figure.experiment in experiments]


def save(name: str, tables: Path, out: Path) -> None:
    """Draw a figure from the tidy tables in `tables` and write `<name>.svg`, `.png` and `.csv` into `out`.

    Of merged tables it draws the runs of its own experiment. Nothing is written where the tables are refused.

    Raises:
        UserError: there is no such figure; the folder `tables` holds no tables, or nothing for this figure; or see
            `check_table` and `check_curves`.
    """
    from lorabench.figures.style import write_figure
    from lorabench.tables import Tables, write_csv

    if name not in FIGURES:
        raise UserError(f"figure {name!r}: allowed: {', '.join(FIGURES)}")
    figure, plotted = FIGURES[name].draw(_of_experiment(Tables.read(tables), FIGURES[name].experiment))
    for kind in ("svg", "png"):
        write_figure(figure, out / f"{name}.{kind}")
    write_csv(plotted, out / f"{name}.csv")


def _of_experiment(tables: Tables, experiment: str) -> Tables:
    """The tables with the runs of one experiment, checked; one without runs reads the table of its name.

    Columns that are missing, and all of a table that is, are nulls to a figure: it shows what there is.
    """
    from lorabench.analysis.arms import check_curves, check_table
    from lorabench.analysis.claims.evidence import NEEDED, curves_of, in_experiments
    from lorabench.tables import with_all_columns

    if experiment == "compute":
        return replace(tables, compute=with_all_columns(tables.compute, "compute"))
    if tables.runs.columns.empty:
        raise UserError("there is no table runs")
    if missing := [name for name in NEEDED if name not in tables.runs]:
        raise UserError(f"the runs table has no column {', '.join(missing)}")
    check_table(tables.runs)
    check_curves(tables.curves)
    runs = with_all_columns(tables.runs[in_experiments(tables.runs, [experiment])], "runs")
    if runs.empty:
        raise UserError(f"the runs table has no runs of the experiment {experiment}")
    return replace(tables, runs=runs, curves=with_all_columns(curves_of(tables.curves, runs), "curves"))
