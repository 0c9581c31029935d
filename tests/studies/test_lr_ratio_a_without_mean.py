"""What the committed runs of an A without the mean input say, as the page on the ratio states it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from studies.lr_ratio.scripts.a_without_mean import PAGE, PUBLISHED_RATIOS, TABLE, page_part

from ..conftest import REPOSITORY

ARMS = ("frozen A", "frozen A without the mean")
SEEDS = (100, 101)


def test_the_table_of_the_page_is_that_of_the_published_preset():
    assert page_part(pd.read_csv(REPOSITORY / PUBLISHED_RATIOS)) in (REPOSITORY / PAGE).read_text(encoding="utf-8")


def test_the_page_states_what_the_runs_say():
    runs = pd.read_csv(REPOSITORY / TABLE)
    page = " ".join((REPOSITORY / PAGE).read_text(encoding="utf-8").split())

    def lowest(trained: str, *seeds: int) -> tuple[float, float]:
        """Return the best LR and its loss, by a parabola through the means at the three LRs that all arms have."""
        chosen = runs[runs["trained"].eq(trained) & runs["seed"].isin(seeds) & runs["lr"].le(2.15e-3)]
        means = chosen.groupby("lr")["nll"].mean()
        assert len(means) == 3
        parabola = np.polynomial.Polynomial.fit(np.log(means.index), means, 2)
        (best,) = parabola.deriv().roots()
        return math.exp(best), parabola(best)

    (plain, loss), (changed, changed_loss) = (lowest(arm, *SEEDS) for arm in ARMS)
    by_seed = [lowest(ARMS[1], seed)[0] / lowest(ARMS[0], seed)[0] for seed in SEEDS]
    ratio = changed / lowest("full fine-tuning", *SEEDS)[0]
    rise, fall = changed / plain, loss - changed_loss
    said = (
        f"It rises by {rise:.2f} (docstrings, two seeds: {by_seed[0]:.2f} and {by_seed[1]:.2f}), to {ratio:.0f} times"
    )
    assert f"{said} that of full fine-tuning, and the lowest loss falls by {fall:.3f} nats" in page
