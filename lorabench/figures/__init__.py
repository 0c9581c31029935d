"""The paper's figures, in the paper's order, redrawn from tidy tables.

Importing this package is cheap (no pandas, no matplotlib), so that the workflow can ask for the names.
A new figure is a module with a function `draw(tables)` and an entry here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lorabench.analysis.comparison import Task
    from lorabench.config import Preset
    from lorabench.tables import Tables


COMPUTE = ("compute",)
"""The experiment that has no runs but a table of its own."""

EVALS = ("evaluation",)
"""In place of experiments: the scores of lm-eval, which a preset has if it has an evaluation."""


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper. `name` is its module and file name; it shows the runs of its experiments and task.

    One of COMPUTE or EVALS shows that table instead.
    """

    name: str
    title: str
    caption: str
    experiments: tuple[str, ...]
    task: Task = "sft"

    def draw(self, tables: Tables) -> tuple[Figure, pd.DataFrame]:
        """The figure and, tidy, exactly what it plots. Runs of another task are left out."""
        shown = replace(tables, runs=self.of_task(tables.runs))
        drawn: tuple[Figure, pd.DataFrame] = import_module(f"{__name__}.{self.name}").draw(shown)
        return drawn

    def of_task(self, runs: pd.DataFrame) -> pd.DataFrame:
        """The runs of the figure's task; one that does not say which is supervised."""
        from lorabench.analysis.arms import is_rl

        return runs[is_rl(runs) == (self.task == "rl")]

    def of_experiments(self, runs: pd.DataFrame) -> pd.DataFrame:
        """The runs of the figure's task and experiments; one that does not say which is of all experiments."""
        from lorabench.analysis.comparison import in_experiments

        return self.of_task(runs[in_experiments(runs, self.experiments)])


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

_ACCURACY_BY_LR = (
    "accuracy (greedy answers, test split, after the last step) against learning rate, the mean over seeds where there "
    "are several, with their standard deviation as error bar. A diamond is the optimum of an arm, interpolated on the "
    "first seed's grid by accuracy on validation, and its bar the 95% bootstrap interval of the optimal learning rate; "
    "an open one is not resolved. The grey line is the model before training. Above the panel, a cross is a run that "
    "diverged and a zero one that never got a reward: it counts with the accuracy of the model before training."
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
            experiments=("rank",),
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
            experiments=("rank",),
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
            experiments=("batch_size",),
        ),
        PaperFigure(
            name="fig4_placement",
            title="Figure 4. Final loss by the layers that carry LoRA",
            caption=_PLACEMENT,
            experiments=("placement",),
        ),
        PaperFigure(
            name="fig5_placement_small",
            title="Figure 5. Final loss by the layers that carry LoRA, on a small dataset",
            caption=_PLACEMENT,
            experiments=("placement_small",),
        ),
        PaperFigure(
            name="fig5_placement_rl",
            title="Figure 5. Accuracy after reinforcement learning by the layers that carry LoRA",
            caption=(
                "Solid lines and circles are LoRA on all layers, dashed and crosses on the MLP, dotted and triangles "
                "pointing down on attention; colour is rank, black full fine-tuning. Left: "
                f"{_ACCURACY_BY_LR} Right: accuracy at an arm's best learning rate, mean over seeds with 95% interval, "
                "against its trainable parameters, which are listed below the panel; open where the best learning rate "
                "is at the edge of its grid. The grey band is two seed standard deviations to either side of the "
                "highest, where repeats let them be measured."
            ),
            experiments=("placement_rl",),
            task="rl",
        ),
        PaperFigure(
            name="fig6_rl_lr",
            title="Figure 6. Accuracy after reinforcement learning against learning rate by LoRA rank",
            caption=f"Final {_ACCURACY_BY_LR} Black is full fine-tuning; colour is LoRA rank.",
            experiments=("rl_gsm8k", "rl_math", "rl_arithmetic", "rl"),
            task="rl",
        ),
        PaperFigure(
            name="fig7_rl_curves",
            title="Figure 7. Accuracy over reinforcement learning, and against learning rate",
            caption=(
                "Left: accuracy (greedy answers, test split) over training, each arm at the learning rate with its "
                "highest accuracy on validation; mean over seeds, the band their standard deviation. Black is full "
                f"fine-tuning; colour is LoRA rank. Right: final {_ACCURACY_BY_LR}"
            ),
            experiments=("rl_deepmath", "rl_arithmetic"),
            task="rl",
        ),
        PaperFigure(
            name="fig8_aime_and_length",
            title="Figure 8. Further problem sets, and responses over reinforcement learning",
            caption=(
                "Each arm at the learning rate with its highest accuracy on validation; mean over seeds, the band "
                "their standard deviation. First: accuracy on problem sets that are not trained on, the share of "
                "answers that are right; how many a run gives is above the panel. Response length: tokens of a "
                "response in the training batches, and above the panel the share cut at the most tokens allowed, at "
                "the end of training. Reflection: share of those responses with a word of backtracking or checking. "
                "Both are running means over a twentieth of the steps. Diverged runs are counted. Black is full "
                "fine-tuning; colour is LoRA rank."
            ),
            experiments=("rl_deepmath", "rl_arithmetic"),
            task="rl",
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
            experiments=("capacity",),
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
            experiments=("capacity",),
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
            experiments=("lr_law",),
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
            experiments=("short_run",),
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
            experiments=("early",),
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
            experiments=("parametrization",),
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
            experiments=("parametrization",),
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
            experiments=("compute",),
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
            experiments=("rank",),
        ),
        PaperFigure(
            name="learned_forgotten",
            title="Learned and forgotten. What each arm gained and lost, and accuracy against loss",
            caption=(
                "Scores of lm-eval, one mark for the run of each arm at its best learning rate (first seed). Left: "
                "what was learned against what is lost on tasks of what may be forgotten. Learned is accuracy on the "
                "task of the data trained on (the strict filter where there are two), or where no task is of these "
                "the mean over all tasks of what is learned; where a task tells the likelihood of the right answers, "
                "as for models too small to be right often, it is their bits per byte below those of the base. "
                "Forgotten are bits per byte of held-out pretraining text above those of the base, or accuracy below "
                "the base's, the mean over tasks where there are several. The cross, where the grey lines meet, is "
                "the base before training. Right: accuracy against the test loss (nats per scored token). Bars are "
                "one standard error over documents of each score alone. All models read the same documents, so a "
                "difference between two is known better than their bars tell. Runs that lack one of the tasks are "
                "counted above the panel. Black squares are full fine-tuning; colour is LoRA rank."
            ),
            experiments=EVALS,
        ),
    )
}


def of_preset(preset: Preset) -> list[PaperFigure]:
    """The figures that a preset makes something for, in the paper's order."""
    made = {*preset.experiments.chosen(), *(EVALS if preset.evaluation else ())}
    return [figure for figure in FIGURES.values() if made & set(figure.experiments)]


def drawable(folders: Sequence[Path]) -> list[str]:
    """Figures that the tables in some folders hold something for.

    Raises:
        UserError: see `Tables.read`.
    """
    from lorabench.tables import Tables

    found = Tables.read(*folders)
    own = {COMPUTE: found.compute, EVALS: found.evals}
    return [
        figure.name
        for figure in FIGURES.values()
        if not (own[figure.experiments] if figure.experiments in own else figure.of_experiments(found.runs)).empty
    ]


def save(name: str, folders: Sequence[Path], out: Path) -> None:
    """Draw a figure from the tidy tables in some folders and write `<name>.svg`, `.png` and `.csv` into `out`.

    Of merged tables it draws the runs of its own experiments. Nothing is written where the tables are refused.

    Raises:
        UserError: there is no such figure; the folders hold no tables, tables that contradict one another, or nothing
            for this figure; or see `check_table` and `check_curves`.
    """
    from lorabench.figures.style import write_figure
    from lorabench.tables import Tables, write_csv

    if name not in FIGURES:
        raise UserError(f"figure {name!r}: allowed: {', '.join(FIGURES)}")
    figure, plotted = FIGURES[name].draw(_of_figure(Tables.read(*folders), FIGURES[name]))
    for kind in ("svg", "png"):
        write_figure(figure, out / f"{name}.{kind}")
    write_csv(plotted, out / f"{name}.csv")


def _of_figure(tables: Tables, figure: PaperFigure) -> Tables:
    """The tables with the runs of a figure, checked; one without runs reads a table of its own.

    Columns that are missing, and all of a table that is, are nulls to a figure: it shows what there is.
    """
    from lorabench.analysis.arms import check_curves, check_table
    from lorabench.analysis.comparison import NEEDED_BY, curves_of
    from lorabench.tables import with_all_columns

    if figure.experiments == COMPUTE:
        return replace(tables, compute=with_all_columns(tables.compute, "compute"))
    if figure.experiments == EVALS:
        return replace(tables, evals=with_all_columns(tables.evals, "evals"))
    if tables.runs.columns.empty:
        raise UserError("there is no table runs")
    if missing := [name for name in NEEDED_BY[figure.task] if name not in tables.runs]:
        raise UserError(f"the runs table has no column {', '.join(missing)}")
    check_table(tables.runs)
    check_curves(tables.curves)
    runs = with_all_columns(figure.of_experiments(tables.runs), "runs")
    if runs.empty:
        raise UserError(f"the runs table has no runs of the experiment {' or '.join(figure.experiments)}")
    return replace(tables, runs=runs, curves=with_all_columns(curves_of(tables.curves, runs), "curves"))
