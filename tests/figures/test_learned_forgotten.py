"""The figure of learned against forgotten, from scores made by hand."""

import math
from typing import Any

import matplotlib.text
import pandas as pd
import pytest

from lorabench.figures.catalog import FIGURES
from lorabench.store.tables import Tables

from ..handmade import evals_table, make_eval

ACC = {"metric": "exact_match", "filter": "strict-match"}
BITS = {"about": "forgotten", "task": "pretraining", "source": None, "metric": "bits_per_byte", "filter": "none"}
BITS |= {"higher_is_better": False}


def scores(rank: int | str | None, learned: float, bits: float, **changes: Any) -> list[dict[str, Any]]:
    """Make the scores of a run (rank None is FullFT, `base` the base): accuracy by both filters, and bits per byte."""
    return [
        make_eval(rank, learned, **ACC, **changes),
        make_eval(rank, learned + 0.1, **(ACC | {"filter": "flexible-extract"}), **changes),
        make_eval(rank, bits, **BITS, **changes),
        make_eval(rank, 2**bits, **(BITS | {"metric": "byte_perplexity"}), **changes),
    ]


ROWS = scores("base", 0.05, 1.50) + scores(None, 0.60, 1.62) + scores(8, 0.55, 1.53)


def draw(rows: list[dict[str, Any]]):
    none = pd.DataFrame()
    return FIGURES["learned_forgotten"].draw(Tables(none, none, evals=evals_table(rows)))


def elsewhere(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train the runs on a dataset that no task reads."""
    return [row | ({"dataset": "hub_set"} if row["method"] else {}) for row in rows]


def by_arm(plotted: pd.DataFrame, column: str) -> dict[str, float]:
    return dict(zip(plotted["arm"], plotted[column], strict=True))


def shows(axes, plotted: pd.DataFrame, across: str, up: str) -> bool:
    """Say whether the marks in a panel are at two columns of the table."""
    marks = {(x, y) for bar in axes.containers for x, y in zip(*bar.lines[0].get_data(), strict=True)}
    return marks == set(plotted[[across, up]].dropna().itertuples(index=False, name=None))


def test_what_is_plotted_is_the_strict_accuracy_and_the_bits_above_the_base():
    figure, plotted = draw(ROWS)
    assert by_arm(plotted, "learned") == {"base": 0.05, "FullFT": 0.60, "LoRA r8": 0.55}
    assert by_arm(plotted, "forgotten") == pytest.approx({"base": 0, "FullFT": 0.12, "LoRA r8": 0.03})
    assert plotted[["learned_stderr", "forgotten_stderr"]].eq(0.02).all(axis=None)
    for axes, across in zip(figure.axes, ("forgotten", "final_test_nll"), strict=True):
        assert shows(axes, plotted, across, "learned")


def test_the_task_on_the_data_trained_on_counts_and_else_the_mean_of_all():
    other = {"task": "lorabench_worked", "source": "worked", **ACC}
    rows = ROWS + [make_eval(rank, 0.2, **other) for rank in ("base", None, 8)]
    assert by_arm(draw(rows)[1], "learned")["LoRA r8"] == 0.55
    _, plotted = draw(elsewhere(rows))
    assert by_arm(plotted, "learned") == pytest.approx({"base": 0.125, "FullFT": 0.40, "LoRA r8": 0.375})
    # This is the standard error of the mean of two independent means with 0.02 each.
    assert plotted["learned_stderr"].tolist() == pytest.approx([0.02 / math.sqrt(2)] * 3)
    # A run without one of the tasks is counted, not averaged.
    fewer = [row for row in rows if (row["task"], row["method"]) != ("lorabench_worked", "fullft")]
    figure, plotted = draw(elsewhere(fewer))
    assert math.isnan(by_arm(plotted, "learned")["FullFT"])
    assert by_arm(plotted, "learned")["LoRA r8"] == pytest.approx(0.375)
    words = " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))
    assert words.count("1 without a score") == 2


ANSWERS = {"task": "lorabench_instruct_bits", "metric": "bits_per_byte", "filter": "none", "higher_is_better": False}
ANSWERED = [make_eval(rank, bits, **ANSWERS) for rank, bits in (("base", 3.0), (None, 1.2), (8, 1.25))]


def test_the_likelihood_of_right_answers_is_what_was_learned_where_a_task_tells_it():
    # Neither the answers of another dataset nor a task of forgetting counts.
    other = [make_eval(rank, 9.0, **(ANSWERS | {"task": "other", "source": "worked"})) for rank in ("base", None, 8)]
    figure, plotted = draw(ROWS + ANSWERED + other)
    assert by_arm(plotted, "learned_bits") == pytest.approx({"base": 0, "FullFT": 1.8, "LoRA r8": 1.75})
    assert shows(figure.axes[0], plotted, "forgotten", "learned_bits")
    assert shows(figure.axes[1], plotted, "final_test_nll", "learned")
