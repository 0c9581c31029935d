"""The catalogue of figures: what each draws, which experiments it reads, and its caption."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from lorabench.analysis.arms import in_experiments
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.store.checks import is_rl
from lorabench.store.tables import Tables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from lorabench.analysis.comparison import Task
    from lorabench.config.preset import Preset

COMPUTE_TABLE = ("compute",)
"""The experiments of a figure that shows the table `compute`; this experiment has no runs."""

EVALS_TABLE = ("evaluation",)
"""In place of experiments, for a figure that shows the table `evals`: the scores that lm-eval gave the models."""

CLAIMS_TABLE = ("claims",)
"""In place of experiments, for the figure that shows the table `claims`."""

OWN_TABLES = (COMPUTE_TABLE, EVALS_TABLE, CLAIMS_TABLE)
"""In place of experiments, for figures that show another table than `runs`."""


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper, of a claim in its text, or of the verdicts.

    It shows the runs of its experiments and task; a figure of one of OWN_TABLES shows that table instead.
    """

    name: str
    """The name of its module in this package, and of its files."""
    title: str
    caption: str
    """An explanation for a reader who sees only the figure and this text."""
    experiments: tuple[str, ...]
    task: Task = "sft"

    def draw(self, tables: Tables) -> tuple[Figure, pd.DataFrame]:
        """Draw the figure from the runs of its task; return it, and exactly what it plots as one tidy table."""
        shown = replace(tables, runs=self.of_task(tables.runs))
        drawn: tuple[Figure, pd.DataFrame] = import_module(f"{__package__}.{self.name}").draw(shown)
        return drawn

    def of_task(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Return the runs of the figure's task; a run without a task counts as supervised."""
        return runs[is_rl(runs) == (self.task == "rl")]

    def of_experiments(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Return the runs of the figure's task and experiments; a run without experiments belongs to all of them."""
        return self.of_task(runs[in_experiments(runs, self.experiments)])


_UNRESOLVED = (
    "An open diamond is not resolved: the optimum or its interval reaches over the edge of the grid, the grid is too "
    "coarse there, or the noise between seeds is unknown."
)

_OPTIMUM = (
    "A diamond marks the optimum of an arm: the lowest point of a parabola in the logarithm of the learning rate, "
    "fitted to the losses of all seeds around the best one. Its bar is the 95% interval of the optimal learning rate. "
    f"{_UNRESOLVED}"
)

_LAYERS = (
    "Solid lines and circles are LoRA on all layers, dashed lines and crosses LoRA on the MLP only (in a mixture of "
    "experts, on the experts), and dotted lines and triangles pointing down LoRA on attention only. Colour is the "
    "LoRA rank, and black is full fine-tuning; each combination is called an arm."
)

_PLACEMENT = (
    f"{_LAYERS} The left panel shows the final test loss (nats per scored token) against the learning rate; where an "
    "arm has several seeds, it is their mean, with their standard deviation as error bar. "
    f"{_OPTIMUM} Above the panel, a triangle stands for a loss beyond the range shown and a cross for a run that "
    "diverged. The right panel shows the lowest test loss of each arm, the minimum of a parabola in log learning rate "
    "that is fitted to all seeds, with its 95% interval, against the number of trainable parameters, which is listed "
    "below the panel; a mark is open where the best learning rate is at the edge of its grid. The grey band reaches "
    f"from the lowest loss up by the default margin, {DEFAULT_MARGINS.loss:.0%} of the gain from the base to full "
    "fine-tuning."
)

_ACCURACY_BY_LR = (
    "the final accuracy against the learning rate: the share of greedy answers on the test split that are right after "
    "the last step. Where an arm has several seeds, it is their mean, with their standard deviation as error bar. A "
    "diamond marks the optimum of an arm: the highest point of a parabola in the logarithm of the learning rate, "
    "fitted to the accuracies of all seeds around the best one. Its bar is the 95% interval of the optimal learning "
    f"rate. {_UNRESOLVED} The grey line is the model before training. Above the panel, a cross stands for a run that "
    "diverged and a zero for a run that never got a reward; such a run counts with the accuracy of the model before "
    "training."
)

FIGURES = {
    figure.name: figure
    for figure in (
        PaperFigure(
            name="verdicts",
            title="Verdicts on the paper's claims",
            caption=(
                "Each row is a claim: its estimate with the 95% interval, in units of the margin that was written down "
                "before the runs. The green part of a row is where the claim holds. A claim of equality holds within "
                "one margin of no difference, or within its band, and a claim of a difference holds from one margin "
                "on; ratios are measured by their logarithms. Colour and mark are the verdict. A difference is "
                "confirmed if its interval lies above 0 and its estimate in the green part. An equality is confirmed "
                "by its 90% interval, which is narrower than the one drawn. The axis is logarithmic beyond 2 "
                "margins, and arrows stand for what lies beyond 30. Claims without an interval or a margin are named "
                "below."
            ),
            experiments=CLAIMS_TABLE,
        ),
        PaperFigure(
            name="fig1_envelopes",
            title="Figure 1. Learning curves by LoRA rank",
            caption=(
                "Each panel shows the validation loss (nats per scored token) against the training step. A line is "
                "the envelope of one arm (full fine-tuning, or LoRA of one rank): at every step it is the lowest loss "
                "over the arm's learning rates, so it is not a single run. Black is full fine-tuning; colour is the "
                "LoRA rank. The grey band reaches two standard deviations between seeds to either side of the lowest "
                "envelope, where repeated runs allow that to be measured. An open circle marks the step from which an "
                "arm stays above that band to the end. Above a panel stand the loss before training, the standard "
                "deviation between seeds and, where there are any, the number of diverged runs."
            ),
            experiments=("rank",),
        ),
        PaperFigure(
            name="fig2_lr_by_rank",
            title="Figure 2. Final loss against learning rate by LoRA rank",
            caption=(
                "Each panel shows the final test loss (nats per scored token) against the learning rate, by arm (full "
                "fine-tuning, or LoRA of one rank). Where an arm has several seeds, the loss is their mean, with their "
                f"standard deviation as error bar. {_OPTIMUM} Above a panel, a triangle stands for a loss beyond the "
                "range shown and a cross for a run that diverged. Grey lines, darker at higher ranks, are losses that "
                "others published for the same model and dataset; their data order, chat template, schedule and length "
                "may differ."
            ),
            experiments=("rank",),
        ),
        PaperFigure(
            name="fig3_batch_size",
            title="Figure 3. LoRA against full fine-tuning by batch size",
            caption=(
                "The upper panels, one per batch size, show the validation loss (nats per scored token) against the "
                "examples seen. A line is the envelope of one arm (full fine-tuning, or LoRA of one rank): at every "
                "step the lowest loss over the arm's learning rates. The vertical range is that of the losses after "
                "the first tenth of the data. Solid black is full fine-tuning, and dashed colour is LoRA by rank; the "
                "number of diverged runs stands above each panel. The lower panels have the batch size on the "
                "horizontal axis, with the arms of one batch size side by side. The left panel shows the lowest test "
                "loss of each arm, the minimum of a parabola in log learning rate that is fitted to all seeds; the "
                "right panel shows that of LoRA minus that of full fine-tuning, paired by seed. Bars are 95% "
                "intervals, where there are several seeds. A mark is open where the best learning rate is at the edge "
                "of its grid."
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
                f"{_LAYERS} The left panel shows {_ACCURACY_BY_LR} The right panel shows the highest "
                "accuracy of each arm, that of a parabola in log learning rate which is fitted to all seeds, with its "
                "95% interval, against the number of trainable parameters, which is listed below the panel; a mark is "
                "open where the best learning rate is at the edge of its grid. The grey band reaches from the highest "
                f"accuracy down by the default margin, {DEFAULT_MARGINS.reward:.0%} of the gain from the base to full "
                "fine-tuning."
            ),
            experiments=("placement_rl",),
            task="rl",
        ),
        PaperFigure(
            name="fig6_rl_lr",
            title="Figure 6. Accuracy after reinforcement learning against learning rate by LoRA rank",
            caption=(
                "Black is full fine-tuning and colour is the LoRA rank; each of them is called an arm. Each panel "
                f"shows {_ACCURACY_BY_LR}"
            ),
            experiments=("rl_gsm8k", "rl_math", "rl_arithmetic", "rl"),
            task="rl",
        ),
        PaperFigure(
            name="fig7_rl_curves",
            title="Figure 7. Accuracy over reinforcement learning, and against learning rate",
            caption=(
                "Black is full fine-tuning and colour is the LoRA rank; each of them is called an arm. The left panel "
                "shows the accuracy (the share of greedy answers on the test split that are right) over training, each "
                "arm at the learning rate with its highest validation accuracy. A line is the mean over seeds, and the "
                f"band around it their standard deviation. The right panel shows {_ACCURACY_BY_LR}"
            ),
            experiments=("rl_deepmath", "rl_arithmetic"),
            task="rl",
        ),
        PaperFigure(
            name="fig8_aime_and_length",
            title="Figure 8. Further problem sets, and responses over reinforcement learning",
            caption=(
                "Black is full fine-tuning and colour is the LoRA rank; each of them is called an arm and shown at the "
                "learning rate with its highest validation accuracy. A line is the mean over seeds, and the band "
                "around it their standard deviation. The first panels show the accuracy on problem sets that are not "
                "trained on: the share of answers that are right. The number of answers of a run stands above the "
                "panel. Response length is the number of tokens of a response in the training batches; above that "
                "panel stands the share of responses that were cut off at the largest length allowed, at the end of "
                "training. KL is that of the sampler's distribution to the learner's on these responses, without its "
                "sign, since rounding may make it negative, and without a band. The dashed line is the limit above "
                "which the gradient is noisy; above the panel stands the number of runs, at any learning rate, with a "
                "step beyond it. Reflection is the share of responses that hold a word of backtracking or checking. "
                "Length, KL and reflection are running means over a twentieth of the steps. The number of diverged "
                "runs stands above the last panel."
            ),
            experiments=("rl_deepmath", "rl_arithmetic"),
            task="rl",
        ),
        PaperFigure(
            name="capacity",
            title="Capacity. Where a rank leaves the shared curve",
            caption=(
                "Black is full fine-tuning and colour is the LoRA rank; each of them is called an arm. The left panel "
                "shows how far the envelope of each arm (at every step the lowest validation loss over its learning "
                "rates) lies above the lowest envelope, in nats per scored token, against the training step. The "
                "vertical axis is linear within the grey band of two standard deviations between seeds, and "
                "logarithmic above it. An open circle marks the step from which an arm stays above the band to the "
                "end. The right panel shows the number of training tokens seen by that step against the number of "
                "adapter parameters; the bar of a circle reaches down to the last point within the band. A rank that "
                "is above the band from its first point on has no circle there, and a triangle is a rank that never "
                "left the band, drawn at all the tokens that it was trained on. The solid line is a fitted power law; "
                "its slope with the 95% interval (shaded) stands above the panel. The dotted line has slope 1: tokens "
                "proportional to parameters. The dashed line is the number of parameters that hold, at 2 bits each, "
                "the summed loss of the first epoch, which is an upper bound on the information in the data. The "
                "number of diverged runs stands above the left panel."
            ),
            experiments=("capacity",),
        ),
        PaperFigure(
            name="memorisation",
            title="Memorization. Bits of random facts stored, by trainable parameters",
            caption=(
                "The figure shows how many bits of random facts a model has stored against the number of its trainable "
                "parameters, at the learning rate with the lowest loss. Bits stored are the entropy of the facts minus "
                "the bits that the trained model still needs to write them down, measured on the facts that it was "
                "trained on. Colour is the LoRA rank, and a black square is full fine-tuning. A short bar is one seed, "
                "a filled mark the mean over seeds, and its vertical line the 95% interval. The dotted and the dashed "
                "line are 1 and 2 bits per parameter, and the level line is the entropy of the facts, the most that "
                "can be stored. Above the panel stand the ranks that stored nothing and the number of diverged runs."
            ),
            experiments=("capacity",),
        ),
        PaperFigure(
            name="lr_law",
            title="Optimal learning rate against hidden size",
            caption=(
                "The left panel shows the fitted optimal learning rate of each model with its 95% interval. Black is "
                "full fine-tuning, and colour is LoRA. Circles and solid lines are the Llama family, squares and "
                "dashed lines Qwen, triangles and dotted lines other families. Lines in colour and black are the law "
                "fitted here, LR = base * M * (2000 / hidden size) ** exponent, where M is 1 for full fine-tuning; its "
                "constants stand above the panel. Grey lines are the same law with the constants in the authors' "
                "code, and grey marks are published optima (open at the edge of their grid); these come from other "
                "data, batch sizes and lengths, on which the optimal learning rate depends. The right panel shows the "
                "optimal learning rate of LoRA over that of full fine-tuning, with its 95% interval. Its grey lines "
                "are the paper's ratio of 10 and, dashed, the hidden size over 64, which a naive derivation gives. An "
                "open mark is not resolved: an optimum or its interval is at the edge of the grid, or the noise "
                "between seeds is unknown. The number of diverged runs stands above the right panel."
            ),
            experiments=("lr_law",),
        ),
        PaperFigure(
            name="lr_ratio",
            title="LR ratio. LoRA's optimal learning rate over that of full fine-tuning, and theories of it",
            caption=(
                "The upper panel shows the ratio of LoRA's optimal learning rate to that of full fine-tuning against "
                "the width of the model. Black marks are measured here, each with its 95% interval; an open mark is "
                "not resolved by its grid of learning rates. Grey diamonds and triangles are ratios that others "
                "published for supervised fine-tuning and for RL, mostly from one seed and a coarse grid (open where "
                "alpha is not 32 or not known), and the star is the paper's 10; lines through them span "
                "the widths of their models and the range that they give. "
                "The lower panels vary the number of steps, alpha and the batch size, with all else fixed; their note "
                "names the width of the models. A grey mark beside a black one is the ratio had longer runs ended at "
                "that step, measured by validation losses. Coloured lines are what theories predict, with parameters "
                "that were written down before these runs. The theory that A moves takes the measured optimum of full "
                "fine-tuning as given, so it is drawn at measured conditions only; the dashed line is the same theory "
                "at the learning rates that the law in the paper authors' code gives for Llama models, after 780 "
                "steps. The page on the LR ratio in the documentation derives the theories."
            ),
            experiments=("lr_ratio",),
        ),
        PaperFigure(
            name="short_run",
            title="Learning rates of short and long runs",
            caption=(
                "Each panel but the last shows what the loss against the learning rate would be if training had ended "
                "at the step in its title: with a constant learning rate, the first steps of a long run are a short "
                "run. The loss is the validation loss at that step (nats per scored token), by arm (full fine-tuning, "
                "or LoRA of one rank); where an arm has several seeds, it is their mean, with their standard deviation "
                f"as error bar. {_OPTIMUM} Above a panel, a triangle stands for a loss beyond the range shown and a "
                "cross for a run that has diverged by that step. The last panel shows the optimal learning rate of "
                "LoRA over that of full fine-tuning by length of the run, with its 95% interval; the dashed lines are "
                "the paper's ratios for long and for short runs."
            ),
            experiments=("short_run",),
        ),
        PaperFigure(
            name="early",
            title="Early curves. Training loss by LoRA rank at one learning rate",
            caption=(
                "The left panel shows the training loss (nats per scored token) of each step's batch before its "
                "update, by LoRA rank. All ranks have the same learning rate and the same batches; a line is the mean "
                "over seeds, each with its own data order. The right panel shows by how much the loss of the lowest "
                "rank above 1 differs from that of the highest rank on the same batches, the mean over seeds without "
                "its sign. A mark is filled where the lower rank has the higher loss and open where it has the lower "
                "loss. The grey line is the half width of the 95% interval over seeds: differences below it cannot be "
                "distinguished from zero. The dashed line is two standard deviations of the training loss over "
                "batches. Before the first update the difference is zero, which has no place on the logarithmic axis. "
                "Diverged runs are left out; their number stands above the left panel."
            ),
            experiments=("early",),
        ),
        PaperFigure(
            name="parametrization",
            title="Parametrization. What alpha/r, A's initial scale and the two learning rates do",
            caption=(
                "LoRA adds a factor times BA to a weight matrix W; colour is its rank r. First update: the panel shows "
                "by how much the first update lowers the loss, to first order, as a ratio to the highest rank, for "
                "three ways in which the factor depends on the rank. Marks are means over seeds with their 95% "
                "interval, and the band is 5% to either side of equality. Redundant pair: runs with the same alpha * "
                "init_A * LR_B and the same init_A / LR_A should have the same losses. The panel shows the largest "
                "difference of the training loss up to a step (nats per scored token) between two runs: in black the "
                "largest over all pairs that should be equal, in grey the range over other pairs, with its lower end "
                "dashed. The dotted line is numerical precision. When A moves: the panel shows the number of steps "
                "until A has moved by its own initial norm, the geometric mean over seeds with its 95% interval, "
                "against init_A (in units of 1/sqrt(d_in)) over the learning rate of A. Grey lines join runs with the "
                "same alpha * init_A * LR_B, whose slope stands above the panel; the dotted line has slope 1, and an "
                "open triangle stands at the end of runs in which A did not move that far. Size of updates: the panel "
                "shows the Frobenius norm of the change of W by one step over the learning rate, in the standard "
                "parametrization at the learning rate nearest to its optimum, as means over seeds with their 95% "
                "interval. Dashed lines are runs whose A has a tenth of the learning rate or less, at the same "
                "learning rate of B, so that A stays still."
            ),
            experiments=("parametrization",),
        ),
        PaperFigure(
            name="variants",
            title="Variants. Alpha and LoRA+ against the standard parametrization, each LR-tuned",
            caption=(
                "A variant has its own alpha, or its own ratio of the learning rate of B to that of A; each is tuned "
                "over learning rates. The left panel shows the lowest test loss (nats per scored token) of each "
                "variant, the minimum of a parabola in log learning rate that is fitted to all seeds, with its 95% "
                "interval. The square is the standard parametrization. The grey band reaches from it down by the "
                f"default margin, {DEFAULT_MARGINS.loss:.0%} of the gain from the base; a variant is better if it lies "
                "to the left of the band. A mark is open where the best learning rate is at the edge of its grid. The "
                "right panel shows the fitted optimal learning rate of A with its 95% interval; an open diamond is not "
                "resolved. The number of diverged runs stands above the left panel."
            ),
            experiments=("parametrization",),
        ),
        PaperFigure(
            name="compute",
            title="Compute. FLOPs, time and memory of a training step",
            caption=(
                "Both panels show what a training step of LoRA takes over what a step of full fine-tuning takes, "
                "against the LoRA rank R. The left panel shows the FLOPs of the linear layers, forward and backward. "
                "Circles are counted while the model runs, where every layer computes the gradient of its input. The "
                "grey line is the paper's formula 2/3 + 2R/N, where N (above the panel) is the width of square layers "
                "that would give the same ratio, and the dotted line is its limit 2/3. The right panel shows the "
                "median time of an optimizer step (squares) and the peak memory (triangles), measured on the machine "
                "named above the panel. The black line is the same cost as that of full fine-tuning."
            ),
            experiments=("compute",),
        ),
        PaperFigure(
            name="loss_by_flops",
            title="Learning curves by training FLOPs",
            caption=(
                "Each panel shows the validation loss (nats per scored token) against the FLOPs that training has "
                "spent in the linear layers. A line is the envelope of one arm (full fine-tuning, or LoRA of one "
                "rank): at every step the lowest loss over the arm's learning rates, so it is not a single run. Black "
                "is full fine-tuning; colour is the LoRA rank. Above a panel stand the standard deviation between "
                "seeds and the number of runs that diverged."
            ),
            experiments=("rank",),
        ),
        PaperFigure(
            name="learned_forgotten",
            title="Learned and forgotten. What each arm gained and lost, and accuracy against loss",
            caption=(
                "A mark is the run of one arm (full fine-tuning, or LoRA of one rank) at its best learning rate, with "
                "the first seed, scored by lm-evaluation-harness. Black squares are full fine-tuning; colour is the "
                "LoRA rank. The left panels show what was learned against what was forgotten. Learned is the accuracy "
                "on the task of the training data (by the strict filter where there are two), or, where no task is of "
                "these data, the mean over all tasks of what is learned. Where a task gives the likelihood of the "
                "right answers, as for models too small to be right often, learned is by how many bits per byte these "
                "answers cost less than under the base. Forgotten is by how many bits per byte held-out pretraining "
                "text costs more than under the base, or by how much the accuracy is lower; it is the mean over tasks "
                "where there are several. The cross, where the grey lines meet, is the base before training. The right "
                "panel shows the accuracy against the test loss (nats per scored token), or those bits per byte where "
                "no task has an accuracy. Bars are one standard error of each score over documents. All models read "
                "the same documents, so a difference between two models is more certain than their bars suggest. The "
                "number of runs that lack one of the tasks stands above the panel."
            ),
            experiments=EVALS_TABLE,
        ),
    )
}
"""All figures by name: the verdicts, then the others in the paper's order."""


def figures_of_preset(preset: Preset) -> list[PaperFigure]:
    """Return the figures that a preset has an experiment or an evaluation for, in the paper's order.

    That of the verdicts comes first; every preset has it.
    """
    chosen = {*preset.experiments.chosen(), *CLAIMS_TABLE, *(EVALS_TABLE if preset.evaluation else ())}
    return [figure for figure in FIGURES.values() if chosen & set(figure.experiments)]
