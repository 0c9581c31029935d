"""The figure of the LR ratio: it plots the measured ratios and what the theories predict of each condition."""

from __future__ import annotations

import numpy as np

from lorabench.store.tables import Tables

from ..claims.test_lr_ratio_theories import CONDITIONS, following, world
from .layout import draw, texts


def test_it_plots_conditions_theories_and_published_ratios():
    _, plotted = draw("lr_ratio", Tables(*world(following("scale"))))
    conditions = plotted[plotted["element"] == "condition"]
    assert len(conditions[conditions["theory"] == "scale"]) == len(CONDITIONS)
    np.testing.assert_allclose(conditions["ratio"] / conditions["off_by"], conditions["predicted"], rtol=1e-6)
    assert set(plotted.loc[plotted["element"] == "line", "theory"]) == {"scale", "fixed_lora", "constant", "naive"}
    published = plotted[plotted["element"] == "published"]
    assert set(published["source"]) > {"LoRA Without Regret", "Orbit E4"}
    # At the paper's own LRs the theory of A's movement gives about the paper's ratio.
    assert plotted.loc[plotted["element"] == "paper_law", "predicted"].between(10, 20).all()


def test_without_a_measured_ratio_it_says_so():
    runs, curves = world(following("scale"), CONDITIONS[:1])
    figure, plotted = draw("lr_ratio", Tables(runs[runs["method"] == "lora"], curves))
    assert "no condition" in texts(figure)
    assert plotted.empty
